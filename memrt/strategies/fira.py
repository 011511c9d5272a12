"""Fira: GaLore's step, and the rest of the gradient scaled as AdamW scales what is in the subspace.

For W [out, in] with sides m <= n and an orthonormal basis P [m, r] of dW's leading subspace:
R = Pᵀ dW [r, n] (or dW P), N is AdamW's direction of R, E = dW - P R what the subspace leaves out,
phi_j = ‖N_j‖ / ‖R_j‖ by channel along the larger side, and
W ← W (1 - lr·wd) - lr·(scale·P N + residual_scale·limit(E diag(phi))). The update has full rank.
`limit` lets the norm of its last term grow by at most 1 % a step, without waiting for the device.

Bytes per weight: basis 4 m r, moments 8 n r (2.03 n r with `int8_states`) in place of 8 m n, and 4
for a norm. The gradient stays, 4 m n (2 in bf16), for E is made of it; with `in_backward` one
weight's at a time is alive. Costs two products with P, 4 m n r operations a weight and step, and a
new basis every `every` steps. Embeddings, head, norms, biases keep AdamW.

Chen et al. 2024, arXiv 2410.01623. E is the paper's, orthogonal to P (the authors' code leaves
1 - scale of P R in it), and like there `scale` is not applied to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, ClassVar

from memrt.optimizers.residual_subspace import ResidualSubspace
from memrt.profiling.accounts import Account
from memrt.projected_weights import ProjectedStrategy
from memrt.registry import register
from memrt.strategy import Promise
from memrt.values import is_number

if TYPE_CHECKING:
    import torch

__all__ = ["Fira"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Fira(ProjectedStrategy):
    """Settings (the authors', which are GaLore's).

    rank: of the subspace. A weight whose smaller side is not above it keeps plain AdamW.
    every: optimizer steps between two refreshes of a weight's basis, staggered over the weights.
    scale: factor on the step inside the subspace (the paper's alpha).
    residual_scale: factor on the step outside of it; 1 in the authors' code, whatever alpha.
    growth: the most that the norm outside may grow in a step; None for no limit.
    targets: linear weights of the repeated layers: "all", "attention" or "mlp"; "all-linear": those
        of the head too; or a list of parts of names and of regular expressions for whole names.
    """

    name: ClassVar[str] = "fira"
    lowers: ClassVar[tuple[Account, ...]] = (Account.OPTIMIZER,)
    needs: ClassVar[frozenset[Promise]] = frozenset(
        {Promise.GRADIENT_IS_FORMED, Promise.PARAMETERS_STAY_WHOLE}
    )

    residual_scale: float = 1.0
    growth: float | None = 1.01

    def __post_init__(self) -> None:
        ProjectedStrategy.__post_init__(self)
        if not (is_number(self.residual_scale) and 0 < self.residual_scale < inf):
            raise ValueError(f"residual_scale={self.residual_scale!r}: must be a number above 0")
        if self.growth is not None and not (is_number(self.growth) and self.growth > 1):
            raise ValueError(
                f"growth={self.growth!r}: must be a number above 1, or None for no limit"
            )

    def projection(
        self, shape: tuple[int, int], *, index: int, offset: int, device: torch.device
    ) -> ResidualSubspace:
        """The subspace of one weight."""
        return ResidualSubspace(
            shape,
            rank=self.rank,
            every=self.every,
            offset=offset,
            scale=self.scale,
            residual_scale=self.residual_scale,
            growth=self.growth,
            device=device,
        )
