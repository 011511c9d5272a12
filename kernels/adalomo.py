"""One step of AdaLomo on one parameter: a factored second moment and a step relative to the weight.

For W [rows, columns] with gradient G, and w the weight of what is new:

    r <- (1 - w) r + w mean_columns(G² + eps_1)               [rows]
    c <- (1 - w) c + w mean_rows(G² + eps_1)                  [columns]
    U = G / sqrt(r cᵀ / mean(r)),    U <- U / max(1, RMS(U) / clip_threshold)
    s = lr * max(eps_2, RMS(W)),     W <- W (1 - s * weight_decay) - s U

Without r, for a vector as [1, columns], c is its whole second moment and U = G / sqrt(c). More
dimensions than two: all but the first are columns. All arithmetic is fp32; narrow weights are
rounded once: to the nearest, or bf16 stochastically (`memrt.kernels.stochastic_rounding`). Nothing
is read on the host.

Three sweeps over the gradient: sums of squares by row and column; RMS(U) and RMS(W); the write. On
CUDA each is a Triton kernel: for bf16 2 + 4 + 6 bytes an element of traffic, and sums in two
stages, without atomics, so that a step has the same bits every time. Temporaries there: 4 bytes a
column for each of at most 128 strips of rows, and a row for each block of 512 to 2048 columns: none
that grow with rows · columns until a row has 2^16 elements. On the CPU, where the sweeps over
pieces of large matrices are compiled: at most two fp32 pieces of PIECE_ELEMENTS elements, a few
numbers a row and column, and what stochastic rounding needs (`workspace_bytes`). Either way a copy
of what is not contiguous and has more than two dimensions.

Source: Lv et al., "AdaLomo: Low-memory Optimization with Adaptive Learning Rate", arXiv 2310.10195.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from memrt.kernels import stochastic_rounding
from memrt.kernels.compiled import CompiledFunction, is_whole_piece
from memrt.kernels.dispatch import uses_triton
from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.profiling.ledger import register_workspace

__all__ = ["adalomo_", "adalomo_reference", "tiles_of", "workspace_bytes"]

PIECE_ELEMENTS = 2**18  # on the CPU: caches hold what a piece needs
COMPILED_FROM_ELEMENTS = 2**20  # of a matrix; compiling takes seconds
TILE_ELEMENTS = 2048
MAX_STRIPS = 128
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def adalomo_reference(
    parameter: Tensor,
    gradient: Tensor,
    row: Tensor | None,
    column: Tensor,
    fresh: Tensor,
    *,
    lr: float,
    weight_decay: float,
    eps: tuple[float, float],
    clip_threshold: float,
) -> None:
    """The formula in plain PyTorch, in place, of matrices. For reading and for tests."""
    wide, weight = gradient.to(column.dtype), parameter.to(column.dtype)
    squared = wide.square() + eps[0]
    column.lerp_(squared.mean(dim=0), fresh)
    update = wide * column.rsqrt()
    if row is not None:
        row.lerp_(squared.mean(dim=1), fresh)
        update *= (row / row.mean()).rsqrt()[:, None]
    update /= (update.square().mean().sqrt() / clip_threshold).clamp(min=1.0)
    size = lr * weight.square().mean().sqrt().clamp(min=eps[1])
    parameter.copy_(weight - size * weight_decay * weight - size * update)


def adalomo_(
    parameter: Tensor,
    gradient: Tensor,
    row: Tensor | None,
    column: Tensor,
    fresh: Tensor,
    *,
    lr: float,
    weight_decay: float,
    eps: tuple[float, float],
    clip_threshold: float,
    rounding: Rounding | None = None,
) -> None:
    """One step, in place on the parameter and its second moment.

    parameter, gradient: same shape; fp32, bf16 or fp16. row: fp32 [rows], None for a vector.
    column: fp32 [columns]. fresh: w, fp32, 0-dim, on the parameter's device. rounding: of a bf16
    parameter, stochastically; without it, to the nearest.
    """
    numbers = (float(lr), float(weight_decay), float(eps[0]), float(eps[1]), float(clip_threshold))
    how = (None, None) if rounding is None else (rounding.step, list(rounding.key))
    _adalomo(parameter, gradient, row, column, fresh, *numbers, *how)


# ---------------------------------------------------------------- operator


@torch.library.custom_op("memrt::adalomo", mutates_args=("parameter", "row", "column"))
def _adalomo(
    parameter: Tensor,
    gradient: Tensor,
    row: Tensor | None,
    column: Tensor,
    fresh: Tensor,
    lr: float,
    weight_decay: float,
    eps_square: float,
    eps_weight: float,
    clip_threshold: float,
    step: Tensor | None = None,
    rounding_key: Sequence[int] | None = None,
) -> None:
    _check(parameter, gradient, row, column)
    rounding = _rounding_of(parameter, step, rounding_key)
    if not parameter.numel():
        return
    weight, grad = _as_matrix(parameter), _as_matrix(gradient)
    _average(row, column, grad, fresh, eps_square)
    factors = (None if row is None else (row / row.mean()).rsqrt_(), column.view(-1).rsqrt())
    squares = _squares(weight, grad, *factors)
    rms_update, rms_weight = squares.div_(parameter.numel()).sqrt_().unbind()
    size = lr * rms_weight.clamp(min=eps_weight)
    along = size / (rms_update / clip_threshold).clamp(min=1.0)
    _write(weight, grad, *factors, along, size * weight_decay, rounding)
    if not _is_matrix(parameter):
        parameter.copy_(weight.view(parameter.shape))


@_adalomo.register_fake
def _(
    parameter: Tensor,
    gradient: Tensor,
    row: Tensor | None,
    column: Tensor,
    fresh: Tensor,
    lr: float,
    weight_decay: float,
    eps_square: float,
    eps_weight: float,
    clip_threshold: float,
    step: Tensor | None = None,
    rounding_key: Sequence[int] | None = None,
) -> None:
    _check(parameter, gradient, row, column)
    _rounding_of(parameter, step, rounding_key)


def _average(
    row: Tensor | None, column: Tensor, gradient: Tensor, fresh: Tensor, eps: float
) -> None:
    """The first sweep: r and c take in the mean squares."""
    if uses_triton(gradient):
        from memrt.kernels._triton.adalomo import launch_sums

        rows, columns = launch_sums(gradient, eps)
    else:
        rows, columns = _sums(gradient, eps)
    column.lerp_(columns.div_(gradient.shape[0]).view_as(column), fresh)
    if row is not None:
        row.lerp_(rows.div_(gradient.shape[1]), fresh)


def _squares(
    weight: Tensor, gradient: Tensor, row_factor: Tensor | None, column_factor: Tensor
) -> Tensor:
    """The second sweep: the sums of the squares of U, not yet bounded, and of W [2]."""
    if uses_triton(weight):
        from memrt.kernels._triton.adalomo import launch_squares

        return launch_squares(weight, gradient, row_factor, column_factor)
    squares = torch.zeros(2, dtype=torch.float32, device=weight.device)
    for rows in _pieces(gradient):
        factor = None if row_factor is None else row_factor[rows]
        piece = (weight[rows], gradient[rows], factor, column_factor, squares)
        if not (_is_compiled(weight, gradient, rows) and _compiled_squares(*piece)):
            _square_piece(*piece)
    return squares


def _write(
    weight: Tensor,
    gradient: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor,
    along: Tensor,
    decay: Tensor,
    rounding: Rounding | None,
) -> None:
    """The third sweep: weight <- weight - (along · U + decay · weight)."""
    if uses_triton(weight):
        from memrt.kernels._triton.adalomo import launch_write

        sizes = torch.stack([along, decay])
        launch_write(weight, gradient, row_factor, column_factor, sizes, rounding)
        return
    for rows in _pieces(gradient):
        factor = None if row_factor is None else row_factor[rows]
        scratch = None if rounding is None else torch.empty_like(weight[rows], dtype=torch.float32)
        piece = (scratch, weight[rows], gradient[rows], factor, column_factor, along, decay)
        if not (_is_compiled(weight, gradient, rows) and _compiled_write(*piece)):
            _write_piece(*piece)
        if scratch is not None and rounding is not None:
            first_index = rows.start * weight.shape[1]
            stochastic_copy_(weight[rows], scratch, rounding=rounding, first_index=first_index)
        del scratch, piece


# ---------------------------------------------------------------- on the CPU


def _sums(gradient: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sums of G² + eps by row and by column."""
    row_sums = gradient.new_empty(gradient.shape[0], dtype=torch.float32)
    column_sums = gradient.new_zeros(gradient.shape[1], dtype=torch.float32)
    added = torch.tensor(eps, dtype=torch.float32)
    for rows in _pieces(gradient):
        piece = (gradient[rows], added, row_sums[rows], column_sums)
        if not (_is_compiled(gradient, gradient, rows) and _compiled_sums(*piece)):
            _sum_piece(*piece)
    return row_sums, column_sums


def _sum_piece(gradient: Tensor, eps: Tensor, row_sums: Tensor, column_sums: Tensor) -> None:
    squared = gradient.to(torch.float32, copy=True).square_().add_(eps)
    row_sums.copy_(squared.sum(dim=1))
    column_sums.add_(squared.sum(dim=0))


def _square_piece(
    weight: Tensor,
    gradient: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor,
    squares: Tensor,
) -> None:
    squares[0] += _direction(gradient, row_factor, column_factor).square_().sum()
    squares[1] += weight.to(torch.float32, copy=True).square_().sum()


def _write_piece(
    scratch: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    row_factor: Tensor | None,
    column_factor: Tensor,
    along: Tensor,
    decay: Tensor,
) -> None:
    """The weight, or an fp32 scratch that is filled in its place, moves."""
    update = _direction(gradient, row_factor, column_factor).mul_(along)
    wide = weight if scratch is None else scratch.copy_(weight)
    wide.sub_(update.addcmul_(wide.float(), decay))


_compiled_sums = CompiledFunction(_sum_piece)
_compiled_squares = CompiledFunction(_square_piece)
_compiled_write = CompiledFunction(_write_piece)


def _direction(gradient: Tensor, row_factor: Tensor | None, column_factor: Tensor) -> Tensor:
    """U of some rows, before its RMS is bounded."""
    piece = gradient.to(torch.float32, copy=True)
    if row_factor is not None:
        piece.mul_(row_factor[:, None])
    return piece.mul_(column_factor)


def _is_compiled(weight: Tensor, gradient: Tensor, rows: slice) -> bool:
    """Whether these rows are a whole piece of matrices that are worth it."""
    whole = _piece_rows(weight.shape[1])
    return is_whole_piece(rows, whole, weight, gradient, at_least=COMPILED_FROM_ELEMENTS)


def _piece_rows(num_columns: int) -> int:
    return max(1, PIECE_ELEMENTS // max(1, num_columns))


def _pieces(matrix: Tensor) -> Iterator[slice]:
    """Slices of whole rows."""
    step = _piece_rows(matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))


# ---------------------------------------------------------------- shapes and bytes


def _shape_of(tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim < 2:
        return 1, tensor.numel()
    return tensor.shape[0], tensor.shape[1:].numel()


def _is_matrix(tensor: Tensor) -> bool:
    """Whether a view of it is one."""
    return tensor.ndim <= 2 or tensor.is_contiguous()


def _as_matrix(tensor: Tensor) -> Tensor:
    if tensor.ndim == 2:
        return tensor
    if tensor.ndim == 1:
        return tensor.unsqueeze(0)
    return tensor.contiguous().view(_shape_of(tensor))


def tiles_of(rows: int, columns: int) -> tuple[int, int, int]:
    """How a GPU goes through a matrix: strips of rows, and rows and columns of a tile.

    A program goes down a strip of a block of columns, tile by tile.
    """
    width = 1 << max(0, columns - 1).bit_length()
    wanted = 1 << max(0, -(-columns // 32) - 1).bit_length()
    block_columns = min(width, max(512, min(wanted, TILE_ELEMENTS)))
    block_rows = TILE_ELEMENTS // block_columns
    return max(1, min(MAX_STRIPS, -(-rows // block_rows))), block_rows, block_columns


def workspace_bytes(
    parameter: Tensor, gradient: Tensor, *others: Any, rounding_key: object = None, **_: Any
) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    rows, columns = _shape_of(parameter)
    num_bytes = sum(
        tensor.numel() * tensor.element_size()
        for tensor in (parameter, gradient)
        if not _is_matrix(tensor)
    )
    if uses_triton(parameter):
        strips, _block_rows, block_columns = tiles_of(rows, columns)
        blocks = -(-columns // block_columns)
        partial = strips * columns + blocks * rows + 2 * strips * blocks
        return num_bytes + 4 * (partial + rows + columns) + 32
    piece = 4 * min(_piece_rows(columns), rows) * columns
    narrow = piece if parameter.dtype != torch.float32 else 0
    beside = max(narrow, 4 * (rows + columns))
    if (others[9] if len(others) > 9 else rounding_key) is not None:  # U is gone, the sum is there
        beside = max(beside, _rounding_bytes(parameter, piece // 4))
    return num_bytes + piece + beside + 4 * (rows + columns) + 32


def _rounding_bytes(parameter: Tensor, num_elements: int) -> int:
    """What stochastic rounding of a piece on the CPU takes."""
    copies = 6 * num_elements if parameter.ndim == 2 and not parameter.is_contiguous() else 0
    scratch = stochastic_rounding.SCRATCH_BYTES
    return copies + scratch * min(num_elements, stochastic_rounding.PIECE_ELEMENTS)


register_workspace("memrt::adalomo", workspace_bytes)


def _rounding_of(
    parameter: Tensor, step: Tensor | None, rounding_key: Sequence[int] | None
) -> Rounding | None:
    if rounding_key is None:
        return None
    if step is None or parameter.dtype is not torch.bfloat16:
        raise ValueError(
            f"stochastic rounding is to bf16 and wants a step, got {parameter.dtype} and "
            f"step={step}"
        )
    first, second = rounding_key
    return Rounding((first, second), step)


def _check(parameter: Tensor, gradient: Tensor, row: Tensor | None, column: Tensor) -> None:
    for name, tensor in (("parameter", parameter), ("gradient", gradient)):
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; adalomo takes fp32, bf16 and fp16")
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"gradient has shape {tuple(gradient.shape)}, the parameter {tuple(parameter.shape)}"
        )
    rows, columns = _shape_of(parameter)
    for name, moment, size in (("row", row, rows), ("column", column, columns)):
        if moment is not None and (moment.dtype != torch.float32 or moment.numel() != size):
            raise ValueError(
                f"{name} must be {size} elements of fp32, got {moment.numel()} of {moment.dtype}"
            )
    if row is None and rows != 1:
        raise ValueError(f"a parameter of {rows} rows has a second moment by row: give row")
