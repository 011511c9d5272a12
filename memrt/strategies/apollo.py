"""APOLLO: the gradient, scaled by channel as AdamW would, from moments of a small random sketch.

For W [out, in] with sides m <= n: R = Pᵀ dW [r, n] (or dW P), P [m, r] random; N is AdamW's
direction of R; W ← W (1 - lr·wd) - lr·sqrt(scale)·limit(dW·diag(‖N_j‖ / ‖R_j‖)), j along the larger
side. `limit` lets the update's norm grow by at most 1 % a step, without waiting for the device.

Bytes per weight: moments 8 n r (2.03 n r with `int8_states`) in place of 8 m n, and 4 for a norm. P
is not kept but made again from a seed: 4 m r of workspace in a step. Costs these m r random numbers
and the sketch, 2 m n r operations a weight and step. The gradient stays, 4 m n (2 in bf16): it *is*
the direction, so unlike GaLore's it must be formed. With `in_backward` one weight's at a time is
alive. (Exact and gradient-free would be W ← W - c·dYᵀ(X diag(s)) inside backward, with the norm
from Gram matrices; but s needs all of R first, so only with one micro-batch a step and no clipping,
and it would save just that one weight's gradient. It is not offered.)

Embeddings, head, norms, biases keep AdamW. Zhu et al. 2024, arXiv 2412.05270.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from memrt.optimizers.scaled_gradient import ScaledGradient
from memrt.profiling.accounts import Account
from memrt.projected_weights import ProjectedStrategy
from memrt.registry import register
from memrt.strategy import Promise
from memrt.values import check_seed, is_number

if TYPE_CHECKING:
    import torch

__all__ = ["Apollo"]

GRANULARITIES = ("channel", "tensor")


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Apollo(ProjectedStrategy):
    """Settings (the paper's, for 1 B parameters and more).

    rank: of the sketch; the paper takes a quarter of the hidden size, 256 from 1 B on. A weight
        whose smaller side is not above it keeps plain AdamW.
    every: optimizer steps between two draws of a weight's sketch, staggered over the weights.
    scale: its root multiplies the update; m / rank gives AdamW's size.
    targets: linear weights of the repeated layers: "all", "attention" or "mlp"; "all-linear": those
        of the head too; or a list of parts of names and of regular expressions for whole names.
    granularity: one factor a "channel", or one for the whole "tensor".
    growth: the most that the norm of an update may grow in a step; None for no limit.
    seed: of the sketches.
    """

    name: ClassVar[str] = "apollo"
    lowers: ClassVar[tuple[Account, ...]] = (Account.OPTIMIZER,)
    needs: ClassVar[frozenset[Promise]] = frozenset(
        {Promise.GRADIENT_IS_FORMED, Promise.PARAMETERS_STAY_WHOLE}
    )

    rank: int = 256
    scale: float = 1.0
    granularity: str = "channel"
    growth: float | None = 1.01
    seed: int = 42

    def __post_init__(self) -> None:
        ProjectedStrategy.__post_init__(self)
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity={self.granularity!r}: use one of {', '.join(GRANULARITIES)}"
            )
        if self.growth is not None and not (is_number(self.growth) and self.growth > 1):
            raise ValueError(
                f"growth={self.growth!r}: must be a number above 1, or None for no limit"
            )
        check_seed(self.seed)

    def projection(
        self, shape: tuple[int, int], *, index: int, offset: int, device: torch.device
    ) -> ScaledGradient:
        """The sketch of one weight."""
        return ScaledGradient(
            shape,
            rank=self.rank,
            every=self.every,
            offset=offset,
            scale=self.scale,
            granularity=self.granularity,  # type: ignore[arg-type]  # checked above
            growth=self.growth,
            seed=self.seed,
            index=index,
            device=device,
        )
