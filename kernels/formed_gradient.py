"""What a projection does with a weight gradient that exists, in fp32 with bounded temporaries.

For G [m, n], s = min(m, n), l = max(m, n): its *channels* are the l vectors of length s along the
larger side (columns for m < n, "left", else rows).

    project_gradient   R = Pᵀ G [r, n] or G P [m, r]: 2 · m · n · r operations
    channel_norms      ‖G_j‖ for every channel j [l]
    add_channels_      W <- decay · W + alpha · G diag(factors), factors by channel, or one for all
    gram               Σ_j G_j G_jᵀ [s, s], of G scaled to a largest element of 1

``add_channels_`` computes in fp32 and rounds once, bf16 weights stochastically where a rounding is
given (``stochastic_rounding``). Norms and write are operators. Traffic on CUDA, where each is one
pass of a Triton kernel, for bf16: G once for the norms (2 bytes an element), and 2 + 2 + 2 for the
write. Nothing is read on the host.

Temporaries: ``project_gradient`` and ``gram`` go through G channel block by channel block; a narrow
(bf16, fp16) block is widened, at most 4 · BLOCK_ELEMENTS bytes (``mixed_precision``). Norms and
write take, on CUDA, 4 bytes a channel for each span of it that a program adds up; on the CPU fp32
copies of narrow pieces of PIECE_ELEMENTS elements, and what stochastic rounding needs
(``norms_workspace_bytes``, ``add_workspace_bytes``). fp32 gradients and weights are not copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memrt.kernels import stochastic_rounding
from memrt.kernels.compiled import CompiledFunction, is_whole_piece
from memrt.kernels.dispatch import uses_triton
from memrt.kernels.mixed_precision import block_rows
from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.profiling.ledger import register_workspace

__all__ = [
    "add_channels_",
    "add_channels_reference",
    "add_workspace_bytes",
    "by_channel",
    "channel_norms",
    "channel_norms_reference",
    "gram",
    "norms_workspace_bytes",
    "project_gradient",
]

PIECE_ELEMENTS = 2**18  # on the CPU: caches hold what a piece needs
# of a matrix, for compiling takes seconds; of fp32 rows PyTorch's own passes are as fast
COMPILED_FROM_ELEMENTS = 2**20
# programs that keep a GPU busy; fewer elements than this for one are not worth a launch's width
MIN_PROGRAMS = 1024
MIN_TILES = 4


def by_channel(matrix: Tensor, *, left: bool) -> Tensor:
    """The view [channels, ...] of a matrix whose channels are columns (``left``) or rows."""
    return matrix.t() if left else matrix


def _blocks(channels: Tensor) -> Iterator[slice]:
    rows = block_rows(channels.shape[1], channels.shape[0])
    for start in range(0, channels.shape[0], rows):
        yield slice(start, start + rows)


def project_gradient(gradient: Tensor, basis: Tensor, *, left: bool) -> Tensor:
    """Return R, fp32 and contiguous, for an fp32 basis [s, r]."""
    channels = by_channel(gradient, left=left)  # [l, s]
    shape = (channels.shape[0], basis.shape[1])
    result = gradient.new_zeros(shape[::-1] if left else shape, dtype=torch.float32)
    target = by_channel(result, left=left)  # [l, r]
    for block in _blocks(channels):
        target[block].addmm_(channels[block].float(), basis)
    return result


# ---------------------------------------------------------------- norms by channel


def channel_norms_reference(matrix: Tensor, *, left: bool) -> Tensor:
    """The norm of every channel, in fp32 at once. For reading and for tests."""
    norms: Tensor = torch.linalg.vector_norm(by_channel(matrix, left=left).float(), dim=1)
    return norms


def channel_norms(matrix: Tensor, *, left: bool) -> Tensor:
    """Return the norm of every channel, fp32 [l]."""
    result: Tensor = _channel_norms(matrix, left)
    return result


@torch.library.custom_op("memrt::channel_norms", mutates_args=())
def _channel_norms(matrix: Tensor, left: bool) -> Tensor:
    channels = by_channel(matrix, left=left)  # [l, s]
    result = torch.empty(channels.shape[0], dtype=torch.float32, device=matrix.device)
    if not channels.numel():
        return result.zero_()
    if uses_triton(matrix):
        from memrt.kernels._triton.formed_gradient import launch_squares

        return torch.sum(launch_squares(channels), dim=0, out=result).sqrt_()
    wide_rows = matrix.dtype == torch.float32 and not left
    if not wide_rows and _is_compiled(matrix, matrix, slice(0, _piece_rows(matrix))):
        return _compiled_norms(matrix, result, left=left)
    for rows in _pieces(channels):
        torch.linalg.vector_norm(channels[rows].float(), dim=1, out=result[rows])
    return result


def _compiled_norms(matrix: Tensor, result: Tensor, *, left: bool) -> Tensor:
    """The same from sums of squares, piece by piece along the memory."""
    squares = result.zero_()
    for rows in _pieces(matrix):
        piece = (matrix[rows], squares if left else squares[rows], left)
        if not (_is_compiled(matrix, matrix, rows) and _compiled_squares(*piece)):
            _square_piece(*piece)
    return squares.sqrt_()


def _square_piece(matrix: Tensor, squares: Tensor, left: bool) -> None:
    squares.add_(matrix.to(torch.float32, copy=True).square_().sum(dim=0 if left else 1))


_compiled_squares = CompiledFunction(_square_piece)


@_channel_norms.register_fake
def _(matrix: Tensor, left: bool) -> Tensor:
    return matrix.new_empty(by_channel(matrix, left=left).shape[0], dtype=torch.float32)


def tile_of(channels: Tensor) -> tuple[int, int]:
    """How many channels, and elements of each, a program takes at a time: along the memory."""
    return (128, 16) if channels.stride(0) == 1 else (4, 512)


def num_spans(channels: Tensor) -> int:
    """Into how many spans channels are cut, each the work of a program, to be enough programs."""
    tile = tile_of(channels)
    programs = -(-channels.shape[0] // tile[0])
    most = -(-channels.shape[1] // (MIN_TILES * tile[1]))
    return max(1, min(most, -(-MIN_PROGRAMS // max(1, programs))))


def norms_workspace_bytes(matrix: Tensor, left: bool) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    channels = by_channel(matrix, left=left)
    if uses_triton(matrix):
        return 4 * num_spans(channels) * channels.shape[0]
    return 0 if matrix.dtype == torch.float32 else 4 * _piece_elements(channels)


register_workspace("memrt::channel_norms", norms_workspace_bytes)


# ---------------------------------------------------------------- the write


def add_channels_reference(
    weight: Tensor, gradient: Tensor, factors: Tensor, *, alpha: float, decay: float, left: bool
) -> Tensor:
    """decay · weight + alpha · gradient · factors in fp32, at once. For reading and for tests."""
    scale = factors if left or factors.dim() == 0 else factors[:, None]
    return weight.float() * decay + (alpha * gradient.float()) * scale


def add_channels_(
    weight: Tensor,
    gradient: Tensor,
    factors: Tensor,
    *,
    alpha: float,
    left: bool,
    decay: float = 1.0,
    rounding: Rounding | None = None,
) -> None:
    """In place: decay · weight + alpha · gradient · factors, rounded once.

    factors: fp32, [l] or 0-dim. rounding: how a bf16 weight is rounded stochastically; None rounds
    to the nearest.
    """
    step, key = (None, None) if rounding is None else (rounding.step, rounding.key)
    _add_channels(weight, gradient, factors, alpha, decay, left, step, key)


@torch.library.custom_op("memrt::add_channels", mutates_args=("weight",))
def _add_channels(
    weight: Tensor,
    gradient: Tensor,
    factors: Tensor,
    alpha: float,
    decay: float,
    left: bool,
    step: Tensor | None,
    rounding_key: Sequence[int] | None,
) -> None:
    _check(weight, gradient, factors, left, step, rounding_key)
    if not weight.numel():
        return
    if uses_triton(weight):
        from memrt.kernels._triton.formed_gradient import launch_add

        launch_add(
            weight,
            gradient,
            factors,
            alpha=alpha,
            decay=decay,
            left=left,
            step=step,
            rounding_key=rounding_key,
        )
        return
    for rows in _pieces(weight):
        by_row = factors.dim() == 1 and not left
        scale = factors[rows, None] if by_row else factors
        target = weight[rows]
        wide = None if step is None else torch.empty_like(target, dtype=torch.float32)
        piece = (wide, target, gradient[rows], scale)
        narrow = torch.float32 not in (weight.dtype, gradient.dtype)
        compiled = narrow and _is_compiled(weight, gradient, rows)
        if not (compiled and _add_compiled(*piece, alpha, decay)):
            _add_piece(*piece, alpha=alpha, decay=decay)
        if wide is not None and step is not None and rounding_key is not None:
            rounding = Rounding((rounding_key[0], rounding_key[1]), step)
            first_index = rows.start * weight.shape[1]
            stochastic_copy_(target, wide, rounding=rounding, first_index=first_index)
        del wide, piece


def _add_piece(
    scratch: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    scale: Tensor,
    *,
    alpha: float,
    decay: float,
) -> None:
    """Into the weight itself, or into an fp32 scratch that is rounded afterwards."""
    wide = weight.float() if scratch is None else scratch.copy_(weight)
    if decay != 1.0:
        wide.mul_(decay)
    wide.addcmul_(gradient.float(), scale, value=alpha)
    if scratch is None and wide is not weight:
        weight.copy_(wide)


def _add_fused(
    scratch: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    scale: Tensor,
    alpha: Tensor,
    decay: Tensor,
) -> None:
    moved = weight.float() * decay + (gradient.float() * alpha) * scale
    (weight if scratch is None else scratch).copy_(moved)


_compiled_add = CompiledFunction(_add_fused)


def _add_compiled(
    scratch: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    scale: Tensor,
    alpha: float,
    decay: float,
) -> bool:
    """Whether it ran. Numbers that change between steps are tensors: each would be compiled for."""
    numbers = (torch.tensor(number, dtype=torch.float32) for number in (alpha, decay))
    return _compiled_add(scratch, weight, gradient, scale, *numbers)


def _is_compiled(weight: Tensor, gradient: Tensor, rows: slice) -> bool:
    """Whether these rows are a whole piece of matrices that are worth it."""
    whole = _piece_rows(weight)
    return is_whole_piece(rows, whole, weight, gradient, at_least=COMPILED_FROM_ELEMENTS)


@_add_channels.register_fake
def _(
    weight: Tensor,
    gradient: Tensor,
    factors: Tensor,
    alpha: float,
    decay: float,
    left: bool,
    step: Tensor | None,
    rounding_key: Sequence[int] | None,
) -> None:
    _check(weight, gradient, factors, left, step, rounding_key)


def add_workspace_bytes(
    weight: Tensor,
    gradient: Tensor,
    factors: Tensor,
    alpha: float,
    decay: float,
    left: bool,
    step: Tensor | None = None,
    rounding_key: Sequence[int] | None = None,
) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    if uses_triton(weight):
        return 0 if factors.is_contiguous() else 4 * factors.numel()
    piece = _piece_elements(weight)
    wide_weight = 0 if weight.dtype == torch.float32 else 4 * piece
    wide_gradient = 0 if gradient.dtype == torch.float32 else 4 * piece
    if rounding_key is None:
        return wide_weight + wide_gradient
    copies = 0 if weight.is_contiguous() else 6 * piece
    scratch = stochastic_rounding.SCRATCH_BYTES * min(piece, stochastic_rounding.PIECE_ELEMENTS)
    return wide_weight + max(wide_gradient, copies + scratch)


register_workspace("memrt::add_channels", add_workspace_bytes)


def _check(
    weight: Tensor,
    gradient: Tensor,
    factors: Tensor,
    left: bool,
    step: Tensor | None,
    rounding_key: Sequence[int] | None,
) -> None:
    if gradient.shape != weight.shape:
        raise ValueError(
            f"the gradient is {tuple(gradient.shape)}, the weight {tuple(weight.shape)}"
        )
    num_channels = by_channel(weight, left=left).shape[0]
    if factors.dtype != torch.float32 or tuple(factors.shape) not in ((), (num_channels,)):
        raise ValueError(
            f"factors are {tuple(factors.shape)} of {factors.dtype}: give fp32, one a channel "
            f"[{num_channels}] or a single number"
        )
    if (step is None) is not (rounding_key is None):
        raise ValueError("step and rounding_key go together: give both or neither")
    if step is not None and weight.dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is to bf16, the weight is {weight.dtype}")


def _piece_rows(matrix: Tensor) -> int:
    return max(1, PIECE_ELEMENTS // max(1, matrix.shape[1]))


def _piece_elements(matrix: Tensor) -> int:
    return min(_piece_rows(matrix), matrix.shape[0]) * matrix.shape[1]


def _pieces(matrix: Tensor) -> Iterator[slice]:
    """Slices of whole rows."""
    rows = _piece_rows(matrix)
    for start in range(0, matrix.shape[0], rows):
        yield slice(start, min(start + rows, matrix.shape[0]))


# ---------------------------------------------------------------- Gram matrix


def gram(gradient: Tensor, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix of the smaller side [s, s], and whether it is of any use (0-dim bool).

    It is none where the gradient is zero or not finite; then the first is the identity.
    """
    channels = by_channel(gradient, left=left)
    magnitude = torch.linalg.vector_norm(gradient, ord=float("inf")).float()
    sound = torch.isfinite(magnitude) & (magnitude > 0.0)
    inverse = torch.where(sound, 1.0 / magnitude, 0.0)
    total = gradient.new_zeros((channels.shape[1],) * 2, dtype=torch.float32)
    for block in _blocks(channels):
        piece = channels[block].float() * inverse
        total.addmm_(piece.t(), piece)
        del piece
    identity = torch.eye(total.shape[0], dtype=torch.float32, device=total.device)
    return torch.where(sound, total, identity), sound
