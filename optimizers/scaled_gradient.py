"""APOLLO's projection: moments of a random sketch of G say by how much to scale each part of G.

For a weight [m, n], s = min(m, n), l = max(m, n), the *channels* of G its l vectors of length s:

    R = Pᵀ G (m < n) or G P,   P [s, r] with elements of N(0, 1/r), drawn anew every ``every`` steps
    N: AdamW's direction of R
    "channel"   s_j = ‖N_j‖ / (‖R_j‖ + 1e-8) for channel j          (APOLLO)
    "tensor"    s = ‖N‖ / (‖R‖ + 1e-8), one for all                 (APOLLO-Mini, with r = 1)
    W <- decay · W - lr · sqrt(scale) · limit(G diag(s))

The direction is the current gradient; the moments only size it. ``limit`` keeps the norm from
growing by more than 1 % a step (``norm_growth``). It compares norms without AdamW's bias
correction, which multiplies outside: so does the authors' 32-bit optimizer (their 8-bit one has it
inside). R_j is about as long as G_j, but N_j has r elements of about 1 where AdamW's has s: the
factors come out sqrt(r / s) of AdamW's, which scale = s / r makes up for.

Moments are kept when P is drawn anew, as the paper does, though they are of other directions then.

Bytes: 4, the last norm. P is not kept: it is made from a seed whenever it is needed, 4 · s · r of
workspace at each step beside ``gaussian_matrix``'s; R takes 4 · l · r; the scaled gradient is
never formed. The weight is read and written once, with its decay and its one rounding: no fp32 copy
of it is made (``formed_gradient.add_channels_``). Nothing waits for the device.

Source: Zhu et al., APOLLO (arXiv 2412.05270).
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from memrt.kernels.counter_hash import key_words
from memrt.kernels.formed_gradient import add_channels_, by_channel, channel_norms
from memrt.kernels.gaussian_matrix import gaussian_matrix
from memrt.kernels.stochastic_rounding import Rounding
from memrt.optimizers.formed_projection import FormedProjection
from memrt.optimizers.norm_growth import NormGrowthLimiter
from memrt.optimizers.refresh import RefreshSchedule

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ScaledGradient", "scaling"]

Granularity = Literal["channel", "tensor"]
_TINY = 1e-8


def scaling(direction: Tensor, gradient: Tensor, *, granularity: Granularity, left: bool) -> Tensor:
    """Return the factors ‖N‖ / (‖R‖ + 1e-8): one a channel [l], or one for all (0-dim)."""
    if granularity == "tensor":
        norms = [torch.linalg.vector_norm(x) for x in (direction, gradient)]
    else:
        norms = [
            torch.linalg.vector_norm(by_channel(x, left=left), dim=1) for x in (direction, gradient)
        ]
    factors: Tensor = norms[0] / norms[1].add_(_TINY)
    return factors


class ScaledGradient(FormedProjection):
    """The random sketch of one weight's gradient, and the scaling of that gradient by it."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int,
        every: int,
        offset: int = 0,
        scale: float = 1.0,
        granularity: Granularity = "channel",
        growth: float | None = 1.01,
        seed: int = 0,
        index: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= rank <= min(shape):
            raise ValueError(f"rank is {rank} for a weight {shape}: give 1 to {min(shape)}")
        if not scale > 0.0:
            raise ValueError(f"scale is {scale}: give a positive number")
        if granularity not in ("channel", "tensor"):
            raise ValueError(f"granularity is {granularity!r}: give 'channel' or 'tensor'")
        super().__init__(shape)
        self.draw_count = 0
        self._rank, self._scale, self._granularity = rank, scale, granularity
        self._schedule = RefreshSchedule(every=every, offset=offset)
        self._limiter = NormGrowthLimiter(growth)
        self._seed, self._index, self._device = seed, index, torch.device(device)
        self._pending = False
        self._given: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the sketch."""
        return self._rank

    def begin_step(self, step: int) -> None:
        """Decide whether P is drawn anew at optimizer step ``step`` >= 0."""
        self.clear()  # a step that was begun and given up
        self._pending = self._schedule.due(step) or self._pending

    def set_projector(self, projector: Tensor) -> None:
        """Put in P [s, k], which sets the rank to k and is never drawn anew (nor saved)."""
        if projector.dim() != 2 or projector.shape[0] != min(self.weight_shape):
            raise ValueError(f"P is {tuple(projector.shape)}: give [{min(self.weight_shape)}, k]")
        self._given = projector.detach().to(self._device, torch.float32, copy=True)
        self._rank = projector.shape[1]

    def projector(self) -> Tensor:
        """P [s, r], made from the seed, the weight's number and the number of draws."""
        if self._given is not None:
            return self._given
        return gaussian_matrix(
            min(self.weight_shape),
            self._rank,
            key=key_words(self._seed, self._index, self.draw_count),
            std=self._rank**-0.5,
            device=self._device,
        )

    def _projector(self, gradient: Tensor) -> Tensor:
        if self._pending:
            self.draw_count += 1
            self._pending = False
        if not self.draw_count:
            raise RuntimeError("nothing was drawn yet: call begin_step() before the step")
        return self.projector()

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
        left = self.is_left
        factors = scaling(direction, gradient, granularity=self._granularity, left=left)
        norm = torch.linalg.vector_norm(channel_norms(formed, left=left) * factors)
        factors.mul_(self._limiter.factor(norm / correction))
        add_channels_(
            weight,
            formed,
            factors,
            alpha=-lr * sqrt(self._scale),
            left=left,
            decay=decay,
            rounding=rounding,
        )

    def forget(self) -> None:
        """Drop the last norm and draw anew, as when the weight stops training."""
        self.clear()
        self._limiter.forget()
        self._pending = True

    def relocate(self, move: Callable[[Tensor], Tensor]) -> None:
        """Keep the last norm in another place: `move` gives a copy there."""
        self.clear()
        self._limiter.relocate(move)

    def tensors(self) -> dict[str, Tensor]:
        """What is held between two steps: the last norm."""
        return self._limiter.tensors()

    def state_dict(self) -> dict[str, Any]:
        """The number of draws, which with the seed is P, the schedule, and the last norm."""
        return {
            "draw_count": self.draw_count,
            "pending": self._pending,
            "seed": self._seed,
            "index": self._index,
            "schedule": self._schedule.state_dict(),
            **self.tensors(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of the projection that gave ``state``, between two steps.

        Its seed and number win: P must be the one that the moments are of.
        """
        self.draw_count = int(state["draw_count"])
        self._pending = bool(state["pending"])
        self._seed, self._index = int(state["seed"]), int(state["index"])
        self._schedule.load_state_dict(state["schedule"], device=self._device)
        self._limiter.load(state, device=self._device)
        self.clear()
