"""What a projection does with a weight gradient that exists, in fp32 with bounded temporaries.

For G [m, n], s = min(m, n), l = max(m, n): its *channels* are the l vectors of length s along the
larger side (columns for m < n, "left", else rows). All functions go through G channel block by
channel block; a narrow (bf16, fp16) block is widened, at most 4 · BLOCK_ELEMENTS bytes
(``mixed_precision``); fp32 gradients and weights are not copied.

    project_gradient   R = Pᵀ G [r, n] or G P [m, r]: 2 · m · n · r operations
    channel_norms      ‖G_j‖ for every channel j [l]
    add_channels_      W <- W + alpha · G diag(factors), the factors by channel, or one for all
    gram               Σ_j G_j G_jᵀ [s, s], of G scaled to a largest element of 1
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memrt.kernels.mixed_precision import block_rows

__all__ = ["add_channels_", "by_channel", "channel_norms", "gram", "project_gradient"]


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


def channel_norms(matrix: Tensor, *, left: bool) -> Tensor:
    """Return the norm of every channel, fp32 [l]."""
    channels = by_channel(matrix, left=left)
    parts = [
        torch.linalg.vector_norm(channels[block].float(), dim=1) for block in _blocks(channels)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_channels_(
    weight: Tensor, gradient: Tensor, factors: Tensor, *, alpha: float, left: bool
) -> None:
    """In place: weight + alpha · gradient · factors, factors [l] or 0-dim, narrow weights rounded
    to the nearest once."""
    target, source = by_channel(weight, left=left), by_channel(gradient, left=left)
    for block in _blocks(target):
        scale = factors if factors.dim() == 0 else factors[block, None]
        piece = target[block]
        if piece.dtype == torch.float32:
            piece.addcmul_(source[block].float(), scale, value=alpha)
        else:
            piece.copy_(piece.float().addcmul_(source[block].float(), scale, value=alpha))


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
