"""What an optimizer needs to know of a projection: the space that a weight's moments live in.

A projected weight W [out, in] has no `.grad`. Its gradient arrives as R = project(dW), of the shape
that the projection names; the update rule runs on R and on moments of that shape, and the direction
N that it finds is lifted back:  W <- decay * W - lr * scale * lift(N), rounded once.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from memrt.kernels.stochastic_rounding import Rounding

__all__ = ["Projection"]


class Projection(Protocol):
    """The low-rank space of one weight. The optimizer reads it; whoever made it keeps its state."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the projected gradient, and so of the moments."""
        ...

    def gradient(self) -> Tensor | None:
        """The projected gradient (fp32), summed over the step's micro-batches.

        None when nothing arrived in this step: the weight is then left alone, without decay.
        """
        ...

    def take_rotation(self) -> Tensor | None:
        """How the moments follow a basis that moved, T [rank, rank], once; None: they stay."""
        ...

    def apply(
        self,
        weight: Tensor,
        direction: Tensor,
        *,
        lr: float,
        decay: float = 1.0,
        rounding: Rounding | None = None,
    ) -> None:
        """In place: weight <- decay * weight - lr * scale * lift(direction), rounded once.

        rounding: how a bf16 weight is rounded, stochastically; None rounds to the nearest.
        """
        ...
