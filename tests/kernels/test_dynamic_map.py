"""The dynamic 8-bit type, against bitsandbytes' map and against a search through all 256 values."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memrt.kernels.dynamic_map import (
    BLOCK_SIZE,
    dequantize_blockwise_reference,
    dynamic_map,
    num_blocks,
    quantize_blockwise_reference,
)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes(signed: bool) -> None:
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(torch.tensor(dynamic_map(signed=signed)), create_dynamic_map(signed=signed))


def test_the_map_can_be_made_under_a_fake_mode() -> None:
    with FakeTensorMode():
        fake = torch.tensor(dynamic_map(signed=True))
    assert isinstance(fake, FakeTensor)
    assert fake.shape == (256,)
    assert fake.dtype == torch.float32


@pytest.mark.parametrize(("signed", "bound"), [(True, 0.45 / 64), (False, 0.45 / 128)])
def test_error_of_the_top_decade_is_half_an_interval(signed: bool, bound: float) -> None:
    code_map = torch.tensor(dynamic_map(signed=signed))
    values = torch.linspace(0.1, 1.0, 5001)
    error = (code_map[None] - values[:, None]).abs().amin(dim=1).max().item()
    assert 0.9 * bound < error <= bound + 2**-23


@pytest.mark.parametrize("num_elements", [0, 1, 67, 255, 256, 257, 5001])
@pytest.mark.parametrize("signed", [True, False])
def test_every_value_takes_its_nearest_code(num_elements: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(num_elements)
    values = torch.randn(num_elements, generator=generator) ** 3  # several decades
    values = values if signed else values.abs()
    code_map = torch.tensor(dynamic_map(signed=signed))

    codes, scales = quantize_blockwise_reference(values, code_map)

    assert codes.shape == values.shape
    assert scales.shape == (num_blocks(num_elements),)
    for block in range(num_blocks(num_elements)):
        elements = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        scale = values[elements].abs().max()
        assert scales[block] == scale
        distance = (values[elements, None].double() / scale - code_map[None]).abs()
        chosen = distance.gather(1, codes[elements, None].long())[:, 0]
        torch.testing.assert_close(chosen, distance.amin(dim=1), rtol=0, atol=2**-23)


def test_zero_blocks_stay_zero() -> None:
    code_map = torch.tensor(dynamic_map(signed=True))
    codes, scales = quantize_blockwise_reference(torch.zeros(300), code_map)
    assert not dequantize_blockwise_reference(codes, scales, code_map).any()


def test_codes_survive_a_round_trip_when_the_scale_is_a_value_of_the_map() -> None:
    code_map = torch.tensor(dynamic_map(signed=False))
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).square()
    codes, scales = quantize_blockwise_reference(values, code_map)
    for _ in range(3):
        values = dequantize_blockwise_reference(codes, scales, code_map)
        again, scales_again = quantize_blockwise_reference(values, code_map)
        assert torch.equal(again, codes)
        assert torch.equal(scales_again, scales)
