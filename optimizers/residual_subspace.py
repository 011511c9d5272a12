"""Fira's projection: GaLore's step, and what the subspace leaves out, sized as the step sizes R.

For a weight [m, n], s = min(m, n), l = max(m, n), its *channels* the l vectors of length s, and an
orthonormal basis P [s, r] of the leading subspace (``formed_subspace``, solver "gram"):

    R = Pᵀ G (m < n) or G P,   N: AdamW's direction of R
    E = G - P R  (or G - R Pᵀ),   phi_j = ‖N_j‖ / (‖R_j‖ + 1e-8) for channel j
    W <- W - lr · (scale · P N + residual_scale · limit(E diag(phi)))

``limit`` keeps the norm of that last term from growing by more than 1 % a step (``norm_growth``),
comparing norms without AdamW's bias correction, as the authors' code does. Their code also takes
G - scale · P R for E, which leaves (1 - scale) of R in it; here E is the paper's, orthogonal to P.

E is never formed: with K = scale · N - residual_scale · phi R (channel by channel, over R in place)
the step is W - lr · P K - lr · residual_scale · phi G, made in one pass over W and G
(``projected_update``), and ‖E_j‖² = ‖G_j‖² - ‖R_j‖².

Bytes: the basis, 4 · s · r, and 4 for a norm; a step's R takes 4 · l · r.

Source: Chen et al., Fira (arXiv 2410.01623).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memrt.kernels.formed_gradient import by_channel, channel_norms
from memrt.kernels.projected_update import ScaledAddend
from memrt.kernels.stochastic_rounding import Rounding
from memrt.optimizers.formed_subspace import FormedSubspace
from memrt.optimizers.norm_growth import NormGrowthLimiter
from memrt.optimizers.scaled_gradient import scaling

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ResidualSubspace"]


class ResidualSubspace(FormedSubspace):
    """The basis of one weight, its step, and the scaled rest of the gradient."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        residual_scale: float = 1.0,
        growth: float | None = 1.01,
        **options: Any,
    ) -> None:
        if not residual_scale > 0.0:
            raise ValueError(f"residual_scale is {residual_scale}: give a positive number")
        if options.get("basis", "float32") != "float32":
            raise ValueError(
                f"basis is {options['basis']!r}: what it leaves out is measured by columns that "
                "are orthonormal; give 'float32'"
            )
        super().__init__(shape, **options)
        self._residual_scale = residual_scale
        self._limiter = NormGrowthLimiter(growth)

    def _update(
        self,
        weight: Tensor,
        direction: Tensor,
        *,
        formed: Tensor,
        gradient: Tensor,
        lr: float,
        correction: Tensor | float,
        decay: float,
        rounding: Rounding | None,
    ) -> None:
        left, channels = self.is_left, by_channel(gradient, left=self.is_left)
        factors = scaling(direction, gradient, granularity="channel", left=left)
        norms = _residual_norms(
            channel_norms(formed, left=left), torch.linalg.vector_norm(channels, dim=1)
        )
        norm = torch.linalg.vector_norm(norms * factors)
        factors.mul_(self._limiter.factor(norm / correction)).mul_(self._residual_scale)
        channels.mul_(factors[:, None].neg())
        self._lift(
            weight,
            gradient.add_(direction, alpha=self._scale),
            alpha=-lr,
            decay=decay,
            rounding=rounding,
            addend=ScaledAddend(formed, factors, alpha=-lr, by_column=left),
        )

    def forget(self) -> None:
        """Free basis and norm, as when the weight stops training."""
        super().forget()
        self._limiter.forget()

    def relocate(self, move: Callable[[Tensor], Tensor]) -> None:
        """Keep basis and norm in another place: `move` gives copies there."""
        super().relocate(move)
        self._limiter.relocate(move)

    def tensors(self) -> dict[str, Tensor]:
        """What is held between two steps: the basis and the last norm."""
        return super().tensors() | self._limiter.tensors()

    def state_dict(self) -> dict[str, Any]:
        """The basis, its schedule and the last norm."""
        return super().state_dict() | self._limiter.tensors()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of the subspace that gave ``state``, between two steps."""
        super().load_state_dict(state)
        self._limiter.load(state, device=self._basis.device)


def _residual_norms(whole: Tensor, inside: Tensor) -> Tensor:
    """sqrt(whole² - inside²), without squares that leave fp32; at least zero."""
    share = torch.where(whole > 0.0, inside / whole, 1.0).clamp_(max=1.0)
    return whole * torch.sqrt((1.0 - share) * (1.0 + share))
