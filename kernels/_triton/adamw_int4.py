"""`memrt.kernels.adamw_int4` in Triton: one pass over parameter, gradient and state.

A program takes 8 blocks of 128 elements. Neighbours share a byte: both read it, and as both lie in
one thread, their codes are joined without leaving it.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels import blockwise_int4 as form
from memrt.kernels._triton.adamw_step import stepped, store_parameter
from memrt.kernels._triton.launching import on_device_of
from memrt.kernels.adamw_step import GROUP_SIZE, num_groups
from memrt.kernels.dispatch import require_triton

BLOCKS = 8
NUM_WARPS = 4
SMALLEST = tl.constexpr(form.SMALLEST)
LARGEST = tl.constexpr(form.LARGEST)
MAP = tl.constexpr(form.MAP)
MIDPOINTS = tl.constexpr(form.MIDPOINTS)
SQUARE_MIDPOINTS = tl.constexpr(form.SQUARE_MIDPOINTS)


@triton.jit
def num_below(ratio, BOUNDS: tl.constexpr):
    """How many of the 15 bounds lie below each ratio (int32)."""
    codes = tl.zeros_like(ratio).to(tl.int32)
    for index in tl.static_range(15):
        codes += (ratio > BOUNDS[index]).to(tl.int32)
    return codes


@triton.jit
def quantize_dynamic(x):
    """Codes (int32) of x [blocks, 128], and scales [blocks, 1]."""
    x = tl.where(tl.abs(x) < SMALLEST, 0.0, x)
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    high = tl.max(x, axis=1, keep_dims=True)
    low = tl.min(x, axis=1, keep_dims=True)
    scale = tl.where(high >= -low, high, low)
    ratio = tl.div_rn(x, tl.broadcast_to(tl.where(scale == 0.0, 1.0, scale), x.shape))
    return num_below(ratio, MIDPOINTS), scale


@triton.jit
def dequantize_dynamic(codes, scale):
    """x [blocks, 128] of codes (int32) and scales [blocks, 1]."""
    value = tl.zeros_like(codes).to(tl.float32) + MAP[0]
    for index in tl.static_range(1, 16):
        value = tl.where(codes == index, MAP[index], value)
    return value * scale


@triton.jit
def quantize_square(x):
    """Codes (int32) of x [blocks, 128], and scales [blocks, 1]."""
    x = tl.minimum(tl.where((x > 0.0) & (x < SMALLEST), SMALLEST, x), LARGEST)
    scale = tl.max(x, axis=1, keep_dims=True)
    ratio = tl.div_rn(x, tl.broadcast_to(tl.where(scale == 0.0, 1.0, scale), x.shape))
    return num_below(ratio, SQUARE_MIDPOINTS), scale


@triton.jit
def dequantize_square(codes, scale):
    """x [blocks, 128] of codes (int32) and scales [blocks, 1]."""
    root = (codes + 1).to(tl.float32) * 0.0625
    return root * root * scale


@triton.jit
def joined(codes, BLOCKS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Bytes [blocks, 64] of codes [blocks, 128]: the even element in the lower half."""
    pairs = tl.reshape(codes, (BLOCKS, GROUP_SIZE // 2, 2))
    shift = tl.arange(0, 2)[None, None, :] * 4
    return tl.sum(pairs << shift, axis=2).to(tl.uint8)


@triton.jit(do_not_specialize=["key0", "key1", "step"])
def adamw_int4_kernel(
    p_ptr,
    g_ptr,
    m_data_ptr,
    v_data_ptr,
    m_scales_ptr,
    v_scales_ptr,
    num_elements,
    decay,
    step_size,
    beta1,
    rest1,
    beta2,
    rest2,
    correction,
    eps,
    key0,
    key1,
    step,
    STOCHASTIC: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The formula of `memrt.kernels.adamw_int4` on `BLOCKS` blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    offsets = block * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    mask = offsets < num_elements
    exists = block * GROUP_SIZE < num_elements
    half = ((offsets & 1) * 4).to(tl.int32)

    p = tl.load(p_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    m_codes = (tl.load(m_data_ptr + offsets // 2, mask=mask, other=0).to(tl.int32) >> half) & 15
    v_codes = (tl.load(v_data_ptr + offsets // 2, mask=mask, other=0).to(tl.int32) >> half) & 15
    m_scale = tl.load(m_scales_ptr + block, mask=exists, other=0.0)
    v_scale = tl.load(v_scales_ptr + block, mask=exists, other=0.0)

    m_before = tl.where(mask, dequantize_dynamic(m_codes, m_scale), 0.0)
    v_before = tl.where(mask, dequantize_square(v_codes, v_scale), 0.0)
    p, m, v = stepped(
        p, g, m_before, v_before, decay, step_size, beta1, rest1, beta2, rest2, correction, eps
    )
    store_parameter(p_ptr, offsets, p, mask, key0, key1, step, STOCHASTIC)
    places = block * (GROUP_SIZE // 2) + tl.arange(0, GROUP_SIZE // 2)[None, :]
    kept = places * 2 < num_elements
    m_codes, m_scale = quantize_dynamic(m)
    tl.store(m_data_ptr + places, joined(m_codes, BLOCKS, GROUP_SIZE), mask=kept)
    tl.store(m_scales_ptr + block, m_scale, mask=exists)
    v_codes, v_scale = quantize_square(v)
    tl.store(v_data_ptr + places, joined(v_codes, BLOCKS, GROUP_SIZE), mask=kept)
    tl.store(v_scales_ptr + block, v_scale, mask=exists)


def launch(
    parameter: Tensor,
    gradient: Tensor,
    state: Sequence[Tensor],
    scalars: Sequence[float],
    rounding_key: Sequence[int] | None,
    step: int,
) -> None:
    """One launch for one parameter; all tensors flat and contiguous."""
    require_triton(parameter, gradient, *state)
    n = parameter.numel()
    if n == 0:
        return
    with on_device_of(parameter):
        adamw_int4_kernel[(triton.cdiv(num_groups(n), BLOCKS),)](
            parameter,
            gradient,
            *state,
            n,
            *scalars,
            *(rounding_key or (0, 0)),
            step,
            STOCHASTIC=rounding_key is not None,
            GROUP_SIZE=GROUP_SIZE,
            BLOCKS=BLOCKS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # the reference's bits
        )
