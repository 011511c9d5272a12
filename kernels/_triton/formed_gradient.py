"""`memrt.kernels.formed_gradient` in Triton: one read for the norms, one pass for the write.

Norms of channels are sums of squares in two stages: a program adds up some channels over a span of
their elements, and PyTorch adds up the spans. No atomics: the same bits every time. The write goes
through the weight in tiles; each element is read and rounded once. Matrices may have any strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.launching import on_device_of
from memrt.kernels._triton.stochastic_rounding import nearest_carry, random_bits, round_to_bf16
from memrt.kernels.dispatch import require_triton
from memrt.kernels.formed_gradient import num_spans, tile_of

BLOCK_ROWS = 4
BLOCK_COLUMNS = 512
NUM_WARPS = 4


@triton.jit
def channel_squares_kernel(
    matrix_ptr,
    sums_ptr,
    num_channels,
    length,
    channel_stride,
    inner_stride,
    span,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """sums [spans, channels] <- the sum of squares of each channel over each span."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < num_channels
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, length)
    start = matrix_ptr + channel.to(tl.int64)[:, None] * channel_stride
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_INNER), dtype=tl.float32)
    for position in range(first, last, BLOCK_INNER):
        inner = position + tl.arange(0, BLOCK_INNER)[None, :]
        x = tl.load(
            start + inner.to(tl.int64) * inner_stride,
            mask=is_channel[:, None] & (inner < last),
            other=0.0,
        ).to(tl.float32)
        total += x * x
    sums = sums_ptr + tl.program_id(1).to(tl.int64) * num_channels
    tl.store(sums + channel, tl.sum(total, axis=1), mask=is_channel)


@triton.jit(do_not_specialize=["key0", "key1"])
def add_channels_kernel(
    weight_ptr,
    gradient_ptr,
    factors_ptr,
    step_ptr,
    num_rows,
    num_columns,
    weight_row,
    weight_column,
    gradient_row,
    gradient_column,
    alpha,
    decay,
    key0,
    key1,
    BY_ROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """weight <- weight · decay + alpha · gradient · factors, of one tile."""
    tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    row = (program // tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (program % tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < num_rows) & (column < num_columns)
    row, column = row.to(tl.int64), column.to(tl.int64)
    if BY_ROW:
        factor = tl.load(factors_ptr + row, mask=row < num_rows, other=0.0)
    elif BY_COLUMN:
        factor = tl.load(factors_ptr + column, mask=column < num_columns, other=0.0)
    else:
        factor = tl.load(factors_ptr)
    places = weight_ptr + (row * weight_row + column * weight_column)
    w = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(
        gradient_ptr + (row * gradient_row + column * gradient_column), mask=mask, other=0.0
    ).to(tl.float32)
    w = w * decay + (alpha * g) * factor
    if weight_ptr.dtype.element_ty == tl.bfloat16:
        carry = nearest_carry(w)
        if STOCHASTIC:
            step = tl.load(step_ptr).to(tl.int32)
            carry = random_bits(row * num_columns + column, key0, key1, step)
        tl.store(places, round_to_bf16(w, carry), mask=mask)
    else:
        tl.store(places, w.to(weight_ptr.dtype.element_ty), mask=mask)


def launch_squares(channels: Tensor) -> Tensor:
    """Return the sums of squares [spans, channels] of channels [channels, length], not empty."""
    require_triton(channels)
    num_channels, length = channels.shape
    spans, (block_channels, block_inner) = num_spans(channels), tile_of(channels)
    sums = torch.empty(spans, num_channels, dtype=torch.float32, device=channels.device)
    with on_device_of(channels):
        channel_squares_kernel[(triton.cdiv(num_channels, block_channels), spans)](
            channels,
            sums,
            num_channels,
            length,
            *channels.stride(),
            triton.cdiv(length, spans),
            BLOCK_CHANNELS=block_channels,
            BLOCK_INNER=block_inner,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # a sum of squares loses nothing by it
        )
    return sums


def launch_add(
    weight: Tensor,
    gradient: Tensor,
    factors: Tensor,
    *,
    alpha: float,
    decay: float,
    left: bool,
    step: Tensor | None,
    rounding_key: Sequence[int] | None,
) -> None:
    """One pass over the weight, which has elements."""
    require_triton(weight, gradient, factors)
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(columns, BLOCK_COLUMNS),)
    with on_device_of(weight):
        add_channels_kernel[grid](
            weight,
            gradient,
            factors.contiguous(),
            weight if step is None else step.to(device=weight.device, dtype=torch.float32),
            rows,
            columns,
            *weight.stride(),
            *gradient.stride(),
            alpha,
            decay,
            *(rounding_key or (0, 0)),
            BY_ROW=factors.dim() == 1 and not left,
            BY_COLUMN=factors.dim() == 1 and left,
            STOCHASTIC=rounding_key is not None,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # the reference's bits
        )
