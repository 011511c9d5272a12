"""Int8 weights against their formula, their error bound and their bytes."""

from __future__ import annotations

import pytest
import torch

from memrt.kernels import int8_weights
from memrt.kernels.int8_weights import (
    int8_bytes,
    int8_dequantize,
    int8_quantize,
    int8_quantize_reference,
)

SHAPES = [(1, 1), (67, 5), (5, 67), (33, 129), (64, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_of_the_reference_and_half_a_code_of_error(
    shape: tuple[int, int], dtype: torch.dtype, axis: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    packed = int8_quantize(weight, axis)
    assert packed.shape == (int8_bytes(shape, axis),)
    codes, scales = int8_weights._parts(packed, shape, axis)
    expected_codes, expected_scales = int8_quantize_reference(weight, axis)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)
    dense = int8_dequantize(packed, shape, axis, dtype)
    assert dense.dtype == dtype
    error = (dense.double() - weight.double()).abs()
    rounding = torch.finfo(dtype).eps * weight.double().abs().amax(dim=1 - axis, keepdim=True)
    assert (error <= 0.5001 * scales.double() + rounding).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_pieces_change_nothing(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 129)
    whole = int8_quantize(weight, axis)
    dense = int8_dequantize(whole, (33, 129), axis, torch.bfloat16)
    monkeypatch.setattr(int8_weights, "PIECE_ELEMENTS", 1000)
    assert torch.equal(int8_quantize(weight, axis), whole)
    assert torch.equal(int8_dequantize(whole, (33, 129), axis, torch.bfloat16), dense)


def test_zero_outputs_stay_zero() -> None:
    weight = torch.randn(4, 8)
    weight[1] = 0
    dense = int8_dequantize(int8_quantize(weight, 0), (4, 8), 0, torch.float32)
    assert torch.equal(dense[1], torch.zeros(8))
    assert torch.isfinite(dense).all()


def test_opcheck() -> None:
    weight = torch.randn(5, 67)
    torch.library.opcheck(int8_quantize, (weight, 1))
    torch.library.opcheck(int8_dequantize, (int8_quantize(weight, 1), [5, 67], 1, torch.bfloat16))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="matrices"):
        int8_quantize(torch.zeros(4), 0)
    with pytest.raises(ValueError, match=r"\[4, 4\] in int8 has 32"):
        int8_dequantize(torch.zeros(3, dtype=torch.uint8), [4, 4], 0, torch.float32)


def test_codes_and_scales_are_those_of_bitsandbytes() -> None:
    """LLM.int8()'s: it multiplies by 127 / max where a division stands here, so ties may differ."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(67, 129).half()
    codes, scales = int8_weights._parts(int8_quantize(weight, 0), weight.shape, 0)
    theirs, largest, outliers = bitsandbytes.functional.int8_vectorwise_quant(weight)
    assert outliers is None
    assert torch.equal(scales.flatten(), largest / 127)
    different = codes != theirs
    assert different.float().mean() < 0.01
    exact = weight.double() / (largest.double() / 127).unsqueeze(1)
    off = (exact - exact.floor() - 0.5).abs()[different]
    assert (off < 127 * 4 * torch.finfo(torch.float32).eps).all()
