"""Moments that follow the basis of their subspace when it moves.

With T = P_newᵀ P_old [r, r] and the bias-corrected moments m̂ = m / (1 - beta1^t) and
v̂ = v / (1 - beta2^t) of a projected gradient [r, n] (of one [n, r], transposed):

    m̂ <- T m̂,    v̂ <- | (T ∘ T) (v̂ - m̂ ∘ m̂) + (T m̂) ∘ (T m̂) |

which are the mean and the mean square of T R when the entries of R vary independently of each
other: v̂ - m̂ ∘ m̂ is their variance. Exact for T of signs and permutations. What leaves the
subspace is lost to both. Source: Robert et al., LDAdam (arXiv 2410.16103), its projection-aware
update without the error feedback.

Workspace: four matrices of the moments' shape in fp32, for one weight at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["rotate_moments_"]


@torch.no_grad()
def rotate_moments_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rotation: Tensor,
    *,
    is_left: bool,
    betas: tuple[float, float],
    step: Tensor,
) -> None:
    """In place, for fp32 moments [r, n] (`is_left`) or [n, r] and a rotation [r, r].

    `step`, 0-dim and not read to the host, says how many gradients the moments have seen.
    """
    correction1, correction2 = (_correction(beta, step) for beta in betas)
    with torch.autocast(exp_avg.device.type, enabled=False):
        mean = exp_avg / correction1
        variance = (exp_avg_sq / correction2).addcmul_(mean, mean, value=-1.0)
        turned = _product(rotation, mean, is_left=is_left)
        second = _product(rotation.square(), variance, is_left=is_left)
        second.addcmul_(turned, turned).abs_()
        exp_avg.copy_(turned.mul_(correction1))
        exp_avg_sq.copy_(second.mul_(correction2))


def _correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^t, which fp32 would round to 4 digits while beta^t is near 1."""
    return torch.expm1(step * math.log(beta)).neg_() if beta else torch.ones_like(step)


def _product(rotation: Tensor, moment: Tensor, *, is_left: bool) -> Tensor:
    return rotation @ moment if is_left else moment @ rotation.t()
