"""Products with a weight gradient that is never formed, and its norm.

For G = AᵀB, with A [tokens, a] and B [tokens, b] the two factors that a linear layer's backward
holds (the output's gradient and the input):

    G M = Aᵀ(B M)   [a, k], for M [b, k]: 2 · tokens · k · (a + b) operations, where forming G
                    takes 2 · tokens · a · b and multiplying it 2 · a · b · k more
    ‖G‖² = Σ_ij (AAᵀ)_ij (BBᵀ)_ij: tokens² · (a + b) operations by symmetry, or the sum over tiles
                    of G, 2 · tokens · a · b; the cheaper of the two is taken

All arithmetic is fp32, whatever the dtype of the factors: low-precision factors are cast a few
tokens at a time. Bytes: the result, and at most 4 · BLOCK_ELEMENTS (``mixed_precision``).

Source of the norm: Goodfellow, "Efficient Per-Example Gradient Computations" (arXiv 1510.01799).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from memrt.kernels import mixed_precision
from memrt.kernels.mixed_precision import block_rows

__all__ = ["add_gradient_times_", "gradient_squared_norm", "gradient_times"]


def gradient_times(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """Return (aᵀ b) @ matrix, fp32 [a columns, k], for an fp32 matrix [b columns, k]."""
    product = matrix.new_zeros(a.shape[1], matrix.shape[1])
    add_gradient_times_(product, a, b, matrix)
    return product


def add_gradient_times_(total: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> None:
    """Add (aᵀ b) @ matrix to the fp32 ``total`` [a columns, k], which may be a transposed view."""
    for piece_a, piece_b in _pieces(a, b, row_elements=matrix.shape[1]):
        total.addmm_(piece_a.t(), piece_b @ matrix)


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
        for piece_a, piece_b in _pieces(columns, b, row_elements=0):
            tile.addmm_(piece_a.t(), piece_b)
        total += torch.linalg.vector_norm(tile).square()
        del tile
    return total


def _pieces(a: Tensor, b: Tensor, *, row_elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors in fp32, so many tokens at a time that casts and products stay bounded.

    ``row_elements`` are the elements that the caller makes of a token; fp32 factors are not copied.
    """
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        row_elements += a.shape[1] + b.shape[1]
    rows = block_rows(2 * row_elements, a.shape[0]) if row_elements else max(1, a.shape[0])
    for start in range(0, a.shape[0], rows):
        yield a[start : start + rows].float(), b[start : start + rows].float()
