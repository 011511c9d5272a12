"""`memrt.kernels.gradient_products` in Triton: two products in fp32, factors read as they are.

    Y = B M [tokens, k],   total += Aᵀ Y,   both by one kernel, ``out (+)= left @ right``

Tensor cores multiply in TF32, which holds 11 of fp32's 24 bits. A bf16 or fp16 factor fits into
them, so its fp32 partner is split into two such parts and multiplied twice, with an error of 2^-21
of each product; two fp32 factors take three products ("tf32x3"). fp32 units would be exact and
slower by what separates them from tensor cores: 19.5 against 156 / 2 TFLOP/s on an A100.

A program makes one tile of the result and sums over all that is inner, so the order of the sums is
fixed. Programs of the same rows come one after the other: a tile of the factor is read from memory
once and by the others from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.launching import on_device_of
from memrt.kernels.dispatch import require_triton

BLOCK_ROWS = 64
BLOCK_COLUMNS = 64
BLOCK_BYTES = 64
"""Bytes of a row of the left factor that are multiplied at a time."""
NUM_WARPS = 4
NARROW_DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def dot_fp32(left, right, total, NARROW: tl.constexpr):
    """total + left @ right, all fp32; with NARROW, `left` has no more bits than TF32 holds."""
    if NARROW:
        upper = (right.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(left, right - upper, total, input_precision="tf32")
        return tl.dot(left, upper, total, input_precision="tf32")
    else:
        return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit
def product_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    num_rows,
    num_columns,
    num_inner,
    left_row_stride,
    left_inner_stride,
    right_inner_stride,
    right_column_stride,
    out_row_stride,
    out_column_stride,
    NARROW: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """out (fp32) <- left @ right (fp32), or that added to it; strides of any order."""
    tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    first_row = (program // tiles).to(tl.int64) * BLOCK_ROWS
    first_column = (program % tiles).to(tl.int64) * BLOCK_COLUMNS
    row, column = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :]
    is_row, is_column = first_row + row < num_rows, first_column + column < num_columns
    inner = tl.arange(0, BLOCK_INNER)
    # offsets inside a tile have 32 bits, its start has 64
    left_ptr += first_row * left_row_stride
    right_ptr += first_column * right_column_stride
    left_offsets = row * left_row_stride + inner[None, :] * left_inner_stride
    right_offsets = inner[:, None] * right_inner_stride + column * right_column_stride

    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, num_inner, BLOCK_INNER):
        is_inner = inner < num_inner - first
        left = tl.load(left_ptr + left_offsets, mask=is_row & is_inner[None, :], other=0.0)
        right = tl.load(right_ptr + right_offsets, mask=is_inner[:, None] & is_column, other=0.0)
        total = dot_fp32(left.to(tl.float32), right, total, NARROW)
        left_ptr += BLOCK_INNER * left_inner_stride
        right_ptr += BLOCK_INNER * right_inner_stride

    out_ptr += first_row * out_row_stride + first_column * out_column_stride
    offsets = row * out_row_stride + column * out_column_stride
    mask = is_row & is_column
    if ADD:
        total += tl.load(out_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, total, mask=mask)


def _launch_product(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    (num_rows, num_inner), num_columns = left.shape, right.shape[1]
    block_columns = min(BLOCK_COLUMNS, max(16, triton.next_power_of_2(num_columns)))
    grid = (triton.cdiv(num_rows, BLOCK_ROWS) * triton.cdiv(num_columns, block_columns),)
    product_kernel[grid](
        left,
        right,
        out,
        num_rows,
        num_columns,
        num_inner,
        *left.stride(),
        *right.stride(),
        *out.stride(),
        NARROW=left.dtype in NARROW_DTYPES,
        ADD=add,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=block_columns,
        BLOCK_INNER=max(16, BLOCK_BYTES // left.element_size()),
        num_warps=NUM_WARPS,
    )


def launch(total: Tensor, a: Tensor, b: Tensor, matrix: Tensor, piece_tokens: int) -> None:
    """Add (aᵀ b) @ matrix to `total` (fp32) [a columns, k], `piece_tokens` tokens at a time."""
    require_triton(total, a, b, matrix)
    if 0 in (*a.shape, *b.shape, *matrix.shape):
        return
    product = matrix.new_empty(min(piece_tokens, a.shape[0]), matrix.shape[1])  # [tokens, k]
    with on_device_of(total):
        for start in range(0, a.shape[0], piece_tokens):
            piece_a, piece_b = (x[start : start + piece_tokens] for x in (a, b))
            piece = product[: piece_a.shape[0]]
            _launch_product(piece, piece_b, matrix, add=False)
            _launch_product(total, piece_a.t(), piece, add=True)
