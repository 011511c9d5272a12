"""`memrt.kernels.uniform_int4` in Triton: each way one pass, over 4 groups of 256 a program.

Neighbours share a byte, and lie in one thread: their codes are joined without leaving it, and both
read the byte again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels import uniform_int4 as form
from memrt.kernels._triton.adamw_int4 import joined
from memrt.kernels._triton.launching import on_device_of
from memrt.kernels._triton.stochastic_rounding import nearest_carry, round_to_bf16
from memrt.kernels.dispatch import require_triton

GROUPS = 4
NUM_WARPS = 4
LARGEST_CODE = tl.constexpr(form.LARGEST_CODE)
MARGIN = tl.constexpr(form.MARGIN)


@triton.jit
def quantize_kernel(
    values_ptr,
    codes_ptr,
    scales_ptr,
    minima_ptr,
    num_elements,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Codes, scales and minima of fp32 [num_elements]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    offsets = group * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offsets < num_elements
    exists = group * GROUP < num_elements
    x = tl.load(values_ptr + offsets, mask=mask, other=0.0)
    x = tl.where(mask, x, tl.load(values_ptr + num_elements - 1))  # a short group's filling

    is_nan = tl.max((x != x).to(tl.int32), axis=1, keep_dims=True) > 0
    low = tl.where(is_nan, float("nan"), tl.min(x, axis=1, keep_dims=True))
    high = tl.max(x, axis=1, keep_dims=True)
    minimum = low - tl.abs(low) * MARGIN
    minima = round_to_bf16(minimum, nearest_carry(minimum))
    minimum = minima.to(tl.float32)
    scale = tl.div_rn(high - minimum, tl.zeros_like(high) + LARGEST_CODE) * (1.0 + MARGIN)
    scales = round_to_bf16(scale, nearest_carry(scale))
    scale = scales.to(tl.float32)

    step = tl.where(scale > 0.0, scale, 1.0)
    share = tl.div_rn(x - minimum, tl.broadcast_to(step, x.shape))
    share = tl.where(share > 0.0, tl.minimum(share, LARGEST_CODE), 0.0)  # of NaN, 0
    # adding 2^23 rounds to whole numbers, ties to even, and leaves them in the lowest bits
    codes = (share + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    pair = group * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    tl.store(codes_ptr + pair, joined(codes, GROUPS, GROUP), mask=2 * pair < num_elements)
    tl.store(scales_ptr + group, scales, mask=exists)
    tl.store(minima_ptr + group, minima, mask=exists)


@triton.jit
def dequantize_kernel(
    values_ptr,
    codes_ptr,
    scales_ptr,
    minima_ptr,
    num_elements,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """fp32 [num_elements] of codes, scales and minima."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    offsets = group * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offsets < num_elements
    exists = group * GROUP < num_elements
    both = tl.load(codes_ptr + (offsets >> 1), mask=mask, other=0).to(tl.int32)
    scale = tl.load(scales_ptr + group, mask=exists, other=0.0).to(tl.float32)
    minimum = tl.load(minima_ptr + group, mask=exists, other=0.0).to(tl.float32)
    codes = (both >> ((offsets & 1) * 4).to(tl.int32)) & 15
    tl.store(values_ptr + offsets, codes.to(tl.float32) * scale + minimum, mask=mask)


def launch_quantize(values: Tensor, codes: Tensor, scales: Tensor, minima: Tensor) -> None:
    """`values` flat and contiguous, into the other three."""
    _launch(quantize_kernel, values, codes, scales, minima)


def launch_dequantize(values: Tensor, codes: Tensor, scales: Tensor, minima: Tensor) -> None:
    """The last three, into contiguous `values`."""
    _launch(dequantize_kernel, values, codes, scales, minima)


def _launch(
    kernel: triton.JITFunction, values: Tensor, codes: Tensor, scales: Tensor, minima: Tensor
) -> None:
    require_triton(values, codes, scales, minima)
    if values.numel() == 0:
        return
    with on_device_of(values):
        kernel[(triton.cdiv(scales.numel(), GROUPS),)](
            values,
            codes,
            scales,
            minima,
            values.numel(),
            GROUP=form.GROUP,
            GROUPS=GROUPS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # the reference's bits
        )
