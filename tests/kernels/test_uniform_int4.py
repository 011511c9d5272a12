"""Four-bit codes: the error bound on every kind of group, packing, bytes, and fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.kernels.uniform_int4 import GROUP, int4_dequantize, int4_quantize, int4_shapes


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


GROUPS = {
    "normal": normal(4 * GROUP),
    "positive": normal(4 * GROUP).abs() + 1,
    "negative": -normal(4 * GROUP).abs() - 2,
    "narrow": 100 + 1e-3 * normal(GROUP),
    "constant": torch.full((GROUP,), 0.5),
    "zeros": torch.zeros(2 * GROUP),
    "tiny": normal(GROUP) * 1e-20,
    "short": normal(GROUP + 67) - 3,
    "one": torch.tensor([-0.3]),
    "two": torch.tensor([[1.0], [2.0]]),
    "matrix": normal(67, 5),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_error_is_at_most_half_a_step(name: str) -> None:
    values = GROUPS[name]
    packed = int4_quantize(values)
    restored = int4_dequantize(packed, tuple(values.shape))
    assert restored.shape == values.shape
    error = (restored.double() - values.double()).abs().flatten()
    steps = packed.scales.double().repeat_interleave(GROUP)[: values.numel()]
    rounding = 2**-23 * values.double().abs().flatten()  # of x' itself
    assert bool((error <= steps / 2 * (1 + 2**-20) + rounding).all())
    # a step is a fifteenth of the group's range, and a hair more for bf16's sake
    for group, scale in zip(values.flatten().split(GROUP), packed.scales, strict=True):
        room = float(group.max() - group.min()) + 2**-6 * float(group.abs().max())
        assert float(scale) <= room / 15 * (1 + 2**-6)


def test_zeros_stay_zero_and_every_code_is_used() -> None:
    assert not int4_dequantize(int4_quantize(torch.zeros(300)), (300,)).any()
    packed = int4_quantize(torch.linspace(-1, 1, GROUP))
    low, high = packed.codes & 15, packed.codes >> 4
    assert torch.cat([low, high]).unique().tolist() == list(range(16))


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000])
def test_codes_share_bytes_in_order(size: int) -> None:
    """Values that codes meet exactly: packing and unpacking is the identity."""
    codes = torch.randint(0, 16, (size,), generator=torch.Generator().manual_seed(size))
    codes[0::GROUP], codes[1::GROUP] = 15, 0
    values = int4_dequantize(int4_quantize(codes.float()), (size,))
    packed = int4_quantize(codes.float())
    assert tuple(tuple(t.shape) for t in packed) == int4_shapes(size)
    assert packed.codes.numel() == -(-size // 2)
    found = torch.stack([packed.codes & 15, packed.codes >> 4], dim=1).flatten()[:size]
    if size > 1:
        assert torch.equal(found.long(), codes)
    assert (values - codes).abs().max() <= 0.55


def test_bytes_and_fake_tensors() -> None:
    real = int4_quantize(normal(64, 48))
    num_bytes = sum(t.numel() * t.element_size() for t in real)
    assert num_bytes == 64 * 48 // 2 + 4 * 64 * 48 // GROUP
    with FakeTensorMode():
        fake = int4_quantize(torch.randn(64, 48))
        restored = int4_dequantize(fake, (64, 48))
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
    assert restored.shape == (64, 48)
