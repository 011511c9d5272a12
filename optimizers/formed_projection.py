"""Projections of a gradient that is formed: `.grad` exists, the moments live in another space.

The optimizer hands ``.grad`` over, runs its rule on ``gradient()`` and gives the direction N back:

    receive(G)  ->  R = Pᵀ G [r, in] (out < in) or G P [out, r]  ->  apply(W, N, lr, correction)

What ``apply`` makes of G, R and N is the subclass's: lift N (GaLore), scale G (APOLLO), lift N and
add what the projection lost (Fira). ``correction`` is sqrt(1 - beta2^t) / (1 - beta1^t), the factor
that AdamW's bias correction put into N: norm-growth limiters compare norms without it.

Bytes: R, 4 · l · r, while its weight is stepped, one weight at a time; G is not copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from memrt.kernels.formed_gradient import project_gradient
from memrt.kernels.stochastic_rounding import Rounding

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FormedProjection"]


class FormedProjection(ABC):
    """The projection of one weight [m, n]; ``shape`` is that of R and of the moments."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.weight_shape = (shape[0], shape[1])
        self.side: Literal["left", "right"] = "left" if shape[0] < shape[1] else "right"
        self._formed: Tensor | None = None  # of weight_shape: the weight's own .grad
        self._gradient: Tensor | None = None  # of shape

    @property
    @abstractmethod
    def rank(self) -> int:
        """Of the space that the moments live in."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the projected gradient, and so of the moments."""
        rows, columns = self.weight_shape
        return (self.rank, columns) if self.side == "left" else (rows, self.rank)

    @property
    def is_left(self) -> bool:
        """Whether the rows are projected, so that channels are columns."""
        return self.side == "left"

    @abstractmethod
    def begin_step(self, step: int) -> None:
        """Decide whether the next gradient moves the projection, at optimizer step ``step``."""

    @abstractmethod
    def _projector(self, gradient: Tensor) -> Tensor:
        """The matrix P [s, r] in fp32 for this gradient, found anew if that is due."""

    @torch.no_grad()
    def receive(self, gradient: Tensor) -> None:
        """Take the weight's gradient, summed over the step's micro-batches, and project it."""
        if tuple(gradient.shape) != self.weight_shape:
            raise ValueError(
                f"the gradient is {tuple(gradient.shape)}: give one of a weight {self.weight_shape}"
            )
        with torch.autocast(gradient.device.type, enabled=False):
            projector = self._projector(gradient)
            self._gradient = project_gradient(gradient, projector, left=self.is_left)
        self._formed = gradient

    def gradient(self) -> Tensor | None:
        """The projected gradient (fp32) between ``receive`` and ``apply``."""
        return self._gradient

    def take_rotation(self) -> Tensor | None:
        """How the moments follow a move, [rank, rank], once; None where they stay."""
        return None

    @torch.no_grad()
    def apply(
        self,
        weight: Tensor,
        direction: Tensor,
        *,
        lr: float,
        correction: Tensor | float = 1.0,
        decay: float = 1.0,
        rounding: Rounding | None = None,
    ) -> None:
        """In place: weight · decay and one step by the direction N; then G and R are let go.

        rounding: how a bf16 weight is rounded, once, stochastically; None rounds to the nearest.
        """
        given = (tuple(weight.shape), tuple(direction.shape))
        if given != (self.weight_shape, self.shape):
            raise ValueError(
                f"weight and direction are {given}: give {self.weight_shape} and {self.shape}"
            )
        if self._formed is None or self._gradient is None:
            raise RuntimeError("there is no gradient: call receive() first")
        formed, gradient = self._formed, self._gradient
        self.clear()
        with torch.autocast(weight.device.type, enabled=False):
            self._update(
                weight,
                direction,
                formed=formed,
                gradient=gradient,
                lr=lr,
                correction=correction,
                decay=decay,
                rounding=rounding,
            )

    @abstractmethod
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
        """Change the decayed weight by N, G (``formed``) and R (``gradient``); round it once."""

    def clear(self) -> None:
        """Let the step's gradients go."""
        self._formed = self._gradient = None

    @abstractmethod
    def forget(self) -> None:
        """Drop what the projection learned, as when the weight stops training."""

    @abstractmethod
    def relocate(self, move: Callable[[Tensor], Tensor]) -> None:
        """Keep what `tensors` gives in another place: `move` gives a copy there."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is held between two steps, by name."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a later run needs between two steps: tensors and plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of the projection that gave ``state``."""
