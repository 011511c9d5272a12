"""`memrt.kernels.projected_update` in Triton: a low-rank product with the weight in its epilogue.

A program makes 64 × 64 elements of the product in fp32 (three TF32 products, `gradient_products`)
and writes them into the weight: decay, the gradient's share and rounding are in the same pass, so
that the weight is read and written once and nothing of its size is made beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.gradient_products import dot_fp32
from memrt.kernels._triton.launching import on_device_of
from memrt.kernels._triton.stochastic_rounding import nearest_carry, random_bits, round_to_bf16
from memrt.kernels.dispatch import require_triton

BLOCK_ROWS = 64
BLOCK_COLUMNS = 64
BLOCK_RANK = 16  # with 32, two fp32 factors in two parts each do not fit into the registers
NUM_WARPS = 4


@triton.jit
def product_tile(left_ptr, right_ptr, rank, inside, strides, BLOCK_RANK: tl.constexpr):
    """left @ right of one tile, in fp32; pointers at its first row and column."""
    row, column, is_row, is_column = inside
    left_row_stride, left_rank_stride, right_rank_stride, right_column_stride = strides
    inner = tl.arange(0, BLOCK_RANK)
    left_offsets = row * left_row_stride + inner[None, :] * left_rank_stride
    right_offsets = inner[:, None] * right_rank_stride + column * right_column_stride
    product = tl.zeros((row.shape[0], column.shape[1]), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        is_inner = inner < rank - first
        left = tl.load(left_ptr + left_offsets, mask=is_row & is_inner[None, :], other=0.0)
        right = tl.load(right_ptr + right_offsets, mask=is_inner[:, None] & is_column, other=0.0)
        product = dot_fp32(left, right, product, False)
        left_ptr += BLOCK_RANK * left_rank_stride
        right_ptr += BLOCK_RANK * right_rank_stride
    return product


@triton.jit
def narrowed(x, index, step_ptr, key0, key1, STOCHASTIC: tl.constexpr, kind: tl.constexpr):
    """x (fp32) in the weight's dtype; `index` are the elements' places in the whole weight."""
    if kind == tl.bfloat16:
        carry = nearest_carry(x)
        if STOCHASTIC:
            carry = random_bits(index, key0, key1, tl.load(step_ptr).to(tl.int32))
        result = round_to_bf16(x, carry)
    else:
        result = x.to(kind)
    return result


@triton.jit(do_not_specialize=["key0", "key1"])
def projected_update_kernel(
    weight_ptr,
    left_ptr,
    right_ptr,
    gradient_ptr,
    factors_ptr,
    step_ptr,
    num_rows,
    num_columns,
    rank,
    weight_row_stride,
    weight_column_stride,
    left_row_stride,
    left_rank_stride,
    right_rank_stride,
    right_column_stride,
    gradient_row_stride,
    gradient_column_stride,
    alpha,
    decay,
    gradient_alpha,
    key0,
    key1,
    HAS_GRADIENT: tl.constexpr,
    FACTORS_BY_COLUMN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """W <- decay W + alpha left @ right + gradient_alpha G diag(factors), one tile; in fp32."""
    tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    first_row = (program // tiles).to(tl.int64) * BLOCK_ROWS
    first_column = (program % tiles).to(tl.int64) * BLOCK_COLUMNS
    row, column = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :]
    is_row, is_column = first_row + row < num_rows, first_column + column < num_columns
    # offsets inside a tile have 32 bits, its start has 64
    left_ptr += first_row * left_row_stride
    right_ptr += first_column * right_column_stride
    strides = left_row_stride, left_rank_stride, right_rank_stride, right_column_stride
    inside = row, column, is_row, is_column
    product = product_tile(left_ptr, right_ptr, rank, inside, strides, BLOCK_RANK)
    mask = is_row & is_column
    weight_ptr += first_row * weight_row_stride + first_column * weight_column_stride
    offsets = row * weight_row_stride + column * weight_column_stride
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = weight * decay + alpha * product
    if HAS_GRADIENT:
        gradient_ptr += first_row * gradient_row_stride + first_column * gradient_column_stride
        places = row * gradient_row_stride + column * gradient_column_stride
        gradient = tl.load(gradient_ptr + places, mask=mask, other=0.0).to(tl.float32)
        if FACTORS_BY_COLUMN:
            factors = tl.load(factors_ptr + first_column + column, mask=is_column, other=0.0)
        else:
            factors = tl.load(factors_ptr + first_row + row, mask=is_row, other=0.0)
        weight += gradient_alpha * (gradient * factors)
    index = (first_row + row) * num_columns + (first_column + column)
    weight = narrowed(weight, index, step_ptr, key0, key1, STOCHASTIC, weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + offsets, weight, mask=mask)


def launch(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float,
    decay: float,
    gradient: Tensor | None,
    factors: Tensor | None,
    gradient_alpha: float,
    by_column: bool,
    step: Tensor | None,
    key0: int,
    key1: int,
) -> None:
    """Change `weight` [m, n] in one pass; `left` [m, r], `right` [r, n] and `factors` are fp32.

    `step` (0-dim) rounds a bf16 weight stochastically; None rounds to the nearest.
    """
    require_triton(weight, left, right)
    if weight.numel() == 0:
        return
    num_rows, num_columns = weight.shape
    added = weight if gradient is None else gradient
    grid = (triton.cdiv(num_rows, BLOCK_ROWS) * triton.cdiv(num_columns, BLOCK_COLUMNS),)
    with on_device_of(weight):
        projected_update_kernel[grid](
            weight,
            left,
            right,
            added,
            left if factors is None else factors,
            left if step is None else step.to(device=weight.device, dtype=left.dtype),
            num_rows,
            num_columns,
            left.shape[1],
            *weight.stride(),
            *left.stride(),
            *right.stride(),
            *added.stride(),
            alpha,
            decay,
            gradient_alpha,
            key0,
            key1,
            HAS_GRADIENT=gradient is not None,
            FACTORS_BY_COLUMN=by_column,
            STOCHASTIC=step is not None,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            BLOCK_RANK=BLOCK_RANK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # decay, product and sum are rounded as PyTorch rounds them
        )
