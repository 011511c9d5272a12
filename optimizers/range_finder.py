"""The leading subspace of a gradient that is never formed, by randomized subspace iteration.

For G = AᵀB [a, b], with A [tokens, a] and B [tokens, b], and a start block Ω [a, k], k > r:

    repeat Q <- qr(G Gᵀ Q), from Q = Ω            Gᵀ Q = Bᵀ(A Q) and G Z = Aᵀ(B Z): no G is formed
    Z = Gᵀ Q,  ZᵀZ = V Λ Vᵀ,  P = Q V[:, :r]      P [a, r], PᵀP = I, by falling captured energy

A start from the old basis plus a few random columns follows a subspace that moves, and still
meets directions that the old basis lacked. Bytes: (3 · a + b) · k · 4 of workspace, beside that of
``memrt.kernels.gradient_products``; time: 4 · (iterations + 1/2) · tokens · k · (a + b) operations.

Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (arXiv 0909.4061).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memrt.kernels.gradient_products import gradient_times

__all__ = ["leading_basis"]


def leading_basis(
    a: Tensor, b: Tensor, *, start: Tensor, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return a basis [a columns, rank] of the leading left subspace of aᵀ b, and whether to use it.

    The second is a 0-dim bool, False where the gradient is zero or not finite: then the first is
    of no use. It is there before the eigensolver, which waits for the device.
    """
    block, sound = start, torch.ones((), dtype=torch.bool, device=start.device)
    for _ in range(iterations):
        image, sound = _normalised_(gradient_times(b, a, block))
        block = torch.linalg.qr(gradient_times(a, b, image)).Q
        del image
    image, sound = _normalised_(gradient_times(b, a, block))
    gram = image.t() @ image
    # The eigensolver raises on numbers that are not finite.
    gram = torch.where(sound, gram, torch.eye(*gram.shape, dtype=gram.dtype, device=gram.device))
    vectors = torch.linalg.eigh(gram).eigenvectors  # by rising energy
    return block @ vectors.flip(1)[:, :rank], sound


def _normalised_(image: Tensor) -> tuple[Tensor, Tensor]:
    """Scale to a largest element of 1: gradients of 1e-20 have squares that fp32 cannot hold."""
    magnitude = torch.linalg.vector_norm(image, ord=float("inf"))
    sound = torch.isfinite(magnitude) & (magnitude > 0.0)
    return image.div_(torch.where(sound, magnitude, 1.0)), sound
