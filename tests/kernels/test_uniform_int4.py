"""Four-bit codes: the error bound on every kind of group, packing, bytes, pieces, and Triton's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.kernels import uniform_int4 as module
from memrt.kernels.compiled import CompiledFunction
from memrt.kernels.uniform_int4 import (
    GROUP,
    PackedInt4,
    dequantize_workspace_bytes,
    int4_dequantize,
    int4_quantize,
    int4_quantize_reference,
    int4_shapes,
    quantize_workspace_bytes,
)
from tests.kernels.allocated_bytes import allocated_peak
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.live_bytes import LiveBytes

# 4 warps of 64 registers a thread leave room for 8 programs on a multiprocessor
MAX_REGISTERS = 64


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


def test_the_formula_in_pythons_own_numbers() -> None:
    """What a saved basis holds must stay what it is: codes, halves of bytes, scales and minima."""
    values = [0.5, -1.0, 2.0, 0.25, 1.7]
    packed = int4_quantize(torch.tensor(values))
    minimum = float(torch.tensor(-1.0 - 2.0**-7).bfloat16())
    scale = float(torch.tensor((2.0 - minimum) / 15 * (1 + 2.0**-7)).bfloat16())
    assert packed.minima.tolist() == [minimum]
    assert packed.scales.tolist() == [scale]
    codes = [round((value - minimum) / scale) for value in [*values, values[-1]]]  # filled up
    assert packed.codes.tolist() == [codes[i] + 16 * codes[i + 1] for i in (0, 2, 4)]
    assert int4_dequantize(packed, (5,)).tolist() == [minimum + code * scale for code in codes[:5]]


def test_pieces_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(67, 45)
    whole = int4_quantize(values)
    restored = int4_dequantize(whole, (67, 45))
    padded = torch.cat([values.flatten(), values.flatten()[-1:].expand(3072 - 67 * 45)])
    reference = int4_quantize_reference(padded.view(-1, GROUP))
    assert torch.equal(reference.codes.flatten()[: whole.codes.numel()], whole.codes)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 2 * GROUP)
    for given in (values, values.t().contiguous().t(), values.repeat_interleave(2, dim=1)[:, ::2]):
        assert_same(int4_quantize(given), whole)
    assert torch.equal(int4_dequantize(whole, (67, 45)), restored)


def test_what_is_not_finite_stays_in_its_group() -> None:
    values = normal(4 * GROUP)
    values[300], values[600] = torch.nan, torch.inf
    restored = int4_dequantize(int4_quantize(values), (4 * GROUP,)).view(4, GROUP)
    assert restored.isfinite().all(dim=1).tolist() == [True, False, False, True]
    assert bool(restored[1].isnan().all())


def test_compiled_pieces_have_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler leaves out a cast to bf16 and back, which would change scales."""
    values = normal(5 * 2048 + 67)
    eager = int4_quantize(values)
    function = CompiledFunction(module._quantize_piece)
    monkeypatch.setattr(module, "_compiled_quantize_piece", function)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 2048)
    monkeypatch.setattr(module, "COMPILED_FROM_ELEMENTS", 1)
    assert_same(int4_quantize(values), eager)
    assert function._compiled is not None
    assert not function.fell_back
    result_bytes = sum(t.numel() * t.element_size() for t in eager)
    peak = allocated_peak(lambda: int4_quantize(values[: 4 * 2048]))
    assert peak <= result_bytes + quantize_workspace_bytes(values)


# ---------------------------------------------------------------- the operators themselves


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """All bits, but for those of a NaN."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


SHAPES = [(1,), (67,), (1000,), (0, 4), (3, 257)]


@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck(shape: tuple[int, ...]) -> None:
    packed = int4_quantize(normal(*shape))
    assert int4_dequantize(packed, shape).shape == shape
    torch.library.opcheck(module._quantize, (normal(*shape),))
    torch.library.opcheck(module._dequantize, (*packed, list(shape)))


def test_opcheck_of_a_transposed_matrix() -> None:
    torch.library.opcheck(module._quantize, (normal(67, 5).t(),))


@pytest.mark.parametrize("size", [67, 1000, 3000, 4096])
def test_workspace_is_what_is_used(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 2048)
    for values in (normal(size), normal(size, 2)[:, 0]):
        with LiveBytes([values]) as seen:
            packed = module._quantize._init_fn(values)
        result_bytes = sum(t.numel() * t.element_size() for t in packed)
        declared = quantize_workspace_bytes(values)
        assert declared / 2.5 <= seen.peak_bytes - result_bytes <= declared
    with LiveBytes(packed) as seen:
        module._dequantize._init_fn(*packed, (size,))
    declared = dequantize_workspace_bytes(*packed, (size,))
    assert declared / 2 <= seen.peak_bytes - 4 * size <= declared
    with FakeTensorMode():
        on_cuda = torch.empty(5000, 5, device="cuda")
        assert quantize_workspace_bytes(on_cuda) == 0
        assert quantize_workspace_bytes(on_cuda.t()) == 4 * 25000


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: int4_quantize(torch.zeros(5).bfloat16()), "values is torch.bfloat16"),
        (lambda p: int4_dequantize(p, (600, 2)), r"codes must be 600 contiguous .*\[600, 2\]"),
        (lambda p: int4_dequantize(p._replace(scales=p.minima.float()), (600,)), "scales must be"),
        (lambda p: int4_dequantize(p._replace(minima=p.minima[:2]), (600,)), "minima must be 3"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[PackedInt4], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(int4_quantize(normal(600)))


# ---------------------------------------------------------------- Triton


def into(values: Tensor, codes: Tensor, scales: Tensor, minima: Tensor, restored: Tensor) -> None:
    """Both operators, into the last four."""
    packed = int4_quantize(values)
    for target, found in zip((codes, scales, minima), packed, strict=True):
        target.copy_(found)
    restored.copy_(int4_dequantize(packed, tuple(restored.shape)))


def test_the_interpreted_kernels_have_the_bits_of_the_reference() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    broken = normal(5 * GROUP)
    broken[300], broken[600], broken[900] = torch.nan, torch.inf, -torch.inf
    inputs = [*GROUPS.values(), broken, normal(67, 45).t(), normal(7, 601) * 1e30, normal(0, 4)]
    calls = []
    for values in inputs:
        codes, scales, minima = int4_shapes(values.numel())
        calls.append(
            {
                "values": values,
                "codes": torch.zeros(codes, dtype=torch.uint8),
                "scales": torch.zeros(scales, dtype=torch.bfloat16),
                "minima": torch.zeros(minima, dtype=torch.bfloat16),
                "restored": torch.zeros(values.shape),
            }
        )
    found = call_interpreted("tests.kernels.test_uniform_int4:into", calls)
    for values, left in zip(inputs, found, strict=True):
        packed = int4_quantize(values)
        assert_same((left["codes"], left["scales"], left["minima"]), packed)
        assert_same((left["restored"],), (int4_dequantize(packed, tuple(values.shape)),))


@pytest.mark.parametrize("kernel", ["quantize_kernel", "dequantize_kernel"])
def test_they_compile_for_every_architecture_without_spills(
    kernel: str, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from memrt.kernels._triton.uniform_int4 import GROUPS, NUM_WARPS

    found = compile_ahead(
        f"memrt.kernels._triton.uniform_int4:{kernel}",
        {
            "values_ptr": "*fp32",
            "codes_ptr": "*u8",
            **dict.fromkeys(("scales_ptr", "minima_ptr"), "*bf16"),
            "num_elements": "i32",
        },
        {"GROUP": GROUP, "GROUPS": GROUPS},
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.registers <= MAX_REGISTERS, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture], resources


@pytest.mark.gpu
def test_a_gpu_has_the_bits_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = normal(1000, 67)
    packed, on_cpu = int4_quantize(values.cuda()), int4_quantize(values)
    assert_same(tuple(t.cpu() for t in packed), on_cpu)
    restored = int4_dequantize(packed, (1000, 67)).cpu()
    assert_same((restored,), (int4_dequantize(on_cpu, (1000, 67)),))
