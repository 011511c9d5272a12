"""Products with a weight gradient that is never formed, and its norm.

For G = AᵀB, with A [tokens, a] and B [tokens, b] the two factors that a linear layer's backward
holds (the output's gradient and the input):

    G M = Aᵀ(B M)   [a, k], for M [b, k]: 2 · tokens · k · (a + b) operations, where forming G
                    takes 2 · tokens · a · b and multiplying it 2 · a · b · k more
    ‖G‖² = Σ_ij (AAᵀ)_ij (BBᵀ)_ij: tokens² · (a + b) operations by symmetry, or the sum over tiles
                    of G, 2 · tokens · a · b; the cheaper of the two is taken

All arithmetic is fp32, whatever the dtype of the factors. Bytes: the result, and for a piece of the
tokens B M in fp32, tokens · k · 4; where PyTorch computes it, beside that a factor of another dtype
in fp32, tokens · (a or b) · 4: in all at most 4 · BLOCK_ELEMENTS, or an eighth of it for all tokens
(``mixed_precision``). Triton reads factors as they are.

Source of the norm: Goodfellow, "Efficient Per-Example Gradient Computations" (arXiv 1510.01799).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from memrt.kernels import mixed_precision
from memrt.kernels.dispatch import uses_triton
from memrt.kernels.mixed_precision import block_rows
from memrt.profiling.ledger import register_workspace

__all__ = [
    "add_gradient_times_",
    "gradient_squared_norm",
    "gradient_times",
    "gradient_times_reference",
]


def gradient_times_reference(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """G M of the formula at the top of this file in plain PyTorch. For reading and for tests."""
    return (a.to(matrix.dtype).t() @ b.to(matrix.dtype)) @ matrix  # [a columns, k]


def gradient_times(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """Return (aᵀ b) @ matrix, fp32 [a columns, k], for an fp32 matrix [b columns, k]."""
    product = matrix.new_zeros(a.shape[1], matrix.shape[1])
    add_gradient_times_(product, a, b, matrix)
    return product


def add_gradient_times_(total: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> None:
    """Add (aᵀ b) @ matrix to the fp32 ``total`` [a columns, k], which may be a transposed view."""
    _add_gradient_times(total, a, b, matrix)


@torch.library.custom_op("memrt::add_gradient_times", mutates_args=("total",))
def _add_gradient_times(total: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> None:
    _check(total, a, b, matrix)
    rows = _piece_tokens(total, a, b, matrix)
    if uses_triton(total):
        from memrt.kernels._triton.gradient_products import launch

        launch(total, a, b, matrix, rows)
        return
    for piece_a, piece_b in zip(torch.split(a, rows), torch.split(b, rows), strict=True):
        product = piece_b.float() @ matrix  # a wide piece of b is gone before one of a exists
        total.addmm_(piece_a.float().t(), product)
        del product


@_add_gradient_times.register_fake
def _(total: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> None:
    _check(total, a, b, matrix)


def _check(total: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> None:
    wanted = [(a.shape[1], matrix.shape[1]), (b.shape[0], a.shape[1]), (b.shape[0], len(matrix))]
    given = [tuple(x.shape) for x in (total, a, b)]
    if given != wanted:
        raise ValueError(
            f"total, a and b are {given} and the matrix {tuple(matrix.shape)}: give [i, k], "
            "[tokens, i], [tokens, j] and [j, k]"
        )
    if total.dtype != torch.float32 or matrix.dtype != torch.float32:
        raise ValueError(f"total and matrix are {total.dtype} and {matrix.dtype}: give fp32")


def _piece_elements(total: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> int:
    """The fp32 elements that are made of a token at a time."""
    narrow = [] if uses_triton(total) else [x for x in (a, b) if x.dtype != torch.float32]
    return int(matrix.shape[1]) + max((int(x.shape[1]) for x in narrow), default=0)


def _piece_tokens(total: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> int:
    return block_rows(_piece_elements(total, a, b, matrix), a.shape[0])


def workspace_bytes(total: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    rows = min(_piece_tokens(total, a, b, matrix), a.shape[0])
    return 4 * rows * _piece_elements(total, a, b, matrix)


register_workspace("memrt::add_gradient_times", workspace_bytes)


def gradient_squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖aᵀ b‖², the squared Frobenius norm, as a 0-dim fp32 tensor."""
    tokens, width = a.shape[0], a.shape[1] + b.shape[1]
    # Two Gram tiles and four pieces of factors within one bound.
    tile = max(1, min(isqrt(mixed_precision.BLOCK_ELEMENTS // 4), block_rows(4 * width)))
    if (tokens + tile) * width < 2 * a.shape[1] * b.shape[1]:
        return _squared_norm_of_grams(a, b, tile=tile)
    return _squared_norm_of_tiles(a, b)


def _squared_norm_of_grams(a: Tensor, b: Tensor, *, tile: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=a.device)
    for start in range(0, a.shape[0], tile):
        left_a, left_b = (x[start : start + tile].float() for x in (a, b))
        for other in range(start, a.shape[0], tile):
            right_a, right_b = (x[other : other + tile].float() for x in (a, b))
            product = (left_a @ right_a.t()).mul_(left_b @ right_b.t()).sum()
            total += product if other == start else 2.0 * product
            del right_a, right_b
    return total


def _squared_norm_of_tiles(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=a.device)
    for columns in torch.split(a, block_rows(2 * b.shape[1], a.shape[1]), dim=1):
        tile = torch.zeros(columns.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
        for piece_a, piece_b in _pieces(columns, b):
            tile.addmm_(piece_a.t(), piece_b)
        total += torch.linalg.vector_norm(tile).square()
        del tile
    return total


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors in fp32, so many tokens at a time that casts stay bounded.

    fp32 factors are not copied.
    """
    narrow = a.dtype != torch.float32 or b.dtype != torch.float32
    width = a.shape[1] + b.shape[1]
    rows = block_rows(2 * width, a.shape[0]) if narrow else max(1, a.shape[0])
    for start in range(0, a.shape[0], rows):
        yield a[start : start + rows].float(), b[start : start + rows].float()
