"""`memrt.kernels.adalomo` in Triton: three sweeps over a matrix, in tiles.

A program goes down a strip of rows of one block of columns. What it adds up by column it keeps in
registers until the strip ends, what it adds up by row it writes for each tile; PyTorch adds up the
strips and the blocks. No atomics: the same bits every time. Matrices may have any strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.launching import on_device_of
from memrt.kernels._triton.stochastic_rounding import nearest_carry, random_bits, round_to_bf16
from memrt.kernels.adalomo import tiles_of
from memrt.kernels.dispatch import require_triton
from memrt.kernels.stochastic_rounding import Rounding

NUM_WARPS = 8


@triton.jit
def places_of(ptr, row, column, row_stride, column_stride):
    """Where the elements of a tile lie."""
    return ptr + (row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride)


@triton.jit
def direction(g, row_ptr, column_factor, row, last, HAS_ROWS: tl.constexpr):
    """U of a tile, before its RMS is bounded."""
    if HAS_ROWS:
        g *= tl.load(row_ptr + row, mask=row < last, other=0.0)
    return g * column_factor


@triton.jit
def sums_kernel(
    gradient_ptr,
    row_sums_ptr,
    column_sums_ptr,
    num_rows,
    num_columns,
    gradient_row,
    gradient_column,
    strip,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums of G² + eps: row_sums [blocks of columns, rows], column_sums [strips, columns]."""
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = column < num_columns
    first = tl.program_id(0) * strip
    last = tl.minimum(first + strip, num_rows)
    row_sums = row_sums_ptr + tl.program_id(1).to(tl.int64) * num_rows
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < last)[:, None] & is_column[None, :]
        places = places_of(
            gradient_ptr, row[:, None], column[None, :], gradient_row, gradient_column
        )
        g = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        squared = tl.where(mask, g * g + eps, 0.0)
        total += squared
        tl.store(row_sums + row, tl.sum(squared, axis=1), mask=row < last)
    column_sums = column_sums_ptr + tl.program_id(0).to(tl.int64) * num_columns
    tl.store(column_sums + column, tl.sum(total, axis=0), mask=is_column)


@triton.jit
def squares_kernel(
    weight_ptr,
    gradient_ptr,
    row_ptr,
    column_ptr,
    squares_ptr,
    num_rows,
    num_columns,
    weight_row,
    weight_column,
    gradient_row,
    gradient_column,
    strip,
    HAS_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """squares [2, strips, blocks of columns] <- sums of U² and of W²."""
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    is_column = column < num_columns
    column_factor = tl.load(column_ptr + column, mask=is_column, other=0.0)
    first = tl.program_id(0) * strip
    last = tl.minimum(first + strip, num_rows)
    of_update = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    of_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < last) & is_column
        places = places_of(gradient_ptr, row, column, gradient_row, gradient_column)
        g = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        places = places_of(weight_ptr, row, column, weight_row, weight_column)
        w = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        u = direction(g, row_ptr, column_factor, row, last, HAS_ROWS)
        of_update += u * u
        of_weight += w * w
    blocks = tl.num_programs(1)
    place = squares_ptr + tl.program_id(0) * blocks + tl.program_id(1)
    tl.store(place, tl.sum(of_update))
    tl.store(place + tl.num_programs(0) * blocks, tl.sum(of_weight))


@triton.jit(do_not_specialize=["key0", "key1"])
def write_kernel(
    weight_ptr,
    gradient_ptr,
    row_ptr,
    column_ptr,
    sizes_ptr,
    step_ptr,
    num_rows,
    num_columns,
    weight_row,
    weight_column,
    gradient_row,
    gradient_column,
    strip,
    key0,
    key1,
    HAS_ROWS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """weight <- weight - (sizes[0] · U + sizes[1] · weight)."""
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    is_column = column < num_columns
    column_factor = tl.load(column_ptr + column, mask=is_column, other=0.0)
    along = tl.load(sizes_ptr)
    decay = tl.load(sizes_ptr + 1)
    first = tl.program_id(0) * strip
    last = tl.minimum(first + strip, num_rows)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < last) & is_column
        places = places_of(gradient_ptr, row, column, gradient_row, gradient_column)
        g = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        places = places_of(weight_ptr, row, column, weight_row, weight_column)
        w = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        u = direction(g, row_ptr, column_factor, row, last, HAS_ROWS)
        w -= u * along + w * decay
        if weight_ptr.dtype.element_ty == tl.bfloat16:
            carry = nearest_carry(w)
            if STOCHASTIC:
                index = row.to(tl.int64) * num_columns + column
                carry = random_bits(index, key0, key1, tl.load(step_ptr).to(tl.int32))
            tl.store(places, round_to_bf16(w, carry), mask=mask)
        else:
            tl.store(places, w.to(weight_ptr.dtype.element_ty), mask=mask)


def _tiling(matrix: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid, the rows of a strip, and what the kernels want to know of a tile."""
    rows, columns = matrix.shape
    strips, block_rows, block_columns = tiles_of(rows, columns)
    strip = triton.cdiv(triton.cdiv(rows, strips), block_rows) * block_rows  # of whole tiles
    blocks = triton.cdiv(columns, block_columns)
    tile = {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns, "num_warps": NUM_WARPS}
    return (triton.cdiv(rows, strip), blocks), strip, tile


def launch_sums(gradient: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the sums of G² + eps by row and by column."""
    require_triton(gradient)
    rows, columns = gradient.shape
    grid, strip, tile = _tiling(gradient)
    row_sums = torch.empty(grid[1], rows, dtype=torch.float32, device=gradient.device)
    column_sums = torch.empty(grid[0], columns, dtype=torch.float32, device=gradient.device)
    with on_device_of(gradient):
        sums_kernel[grid](
            gradient,
            row_sums,
            column_sums,
            rows,
            columns,
            *gradient.stride(),
            strip,
            eps,
            enable_fp_fusion=True,  # a sum of squares loses nothing by it
            **tile,
        )
    return row_sums.sum(dim=0), column_sums.sum(dim=0)


def launch_squares(
    weight: Tensor, gradient: Tensor, row_factor: Tensor | None, column_factor: Tensor
) -> Tensor:
    """Return the sums of U² and of W² [2]."""
    require_triton(weight, gradient)
    grid, strip, tile = _tiling(weight)
    squares = torch.empty(2, *grid, dtype=torch.float32, device=weight.device)
    with on_device_of(weight):
        squares_kernel[grid](
            weight,
            gradient,
            column_factor if row_factor is None else row_factor,
            column_factor,
            squares,
            *weight.shape,
            *weight.stride(),
            *gradient.stride(),
            strip,
            HAS_ROWS=row_factor is not None,
            enable_fp_fusion=True,
            **tile,
        )
    return squares.sum(dim=(1, 2))


def launch_write(
    weight: Tensor,
    gradient: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor,
    sizes: Tensor,
    rounding: Rounding | None,
) -> None:
    """One pass over the weight; sizes: of the step and of the decay [2]."""
    require_triton(weight, gradient)
    grid, strip, tile = _tiling(weight)
    step = sizes if rounding is None else rounding.step.to(weight.device, torch.float32)
    with on_device_of(weight):
        write_kernel[grid](
            weight,
            gradient,
            column_factor if row_factor is None else row_factor,
            column_factor,
            sizes,
            step,
            *weight.shape,
            *weight.stride(),
            *gradient.stride(),
            strip,
            *((0, 0) if rounding is None else rounding.key),
            HAS_ROWS=row_factor is not None,
            STOCHASTIC=rounding is not None,
            enable_fp_fusion=False,  # the reference's order of roundings
            **tile,
        )
