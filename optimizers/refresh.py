"""When the basis of a subspace is sought anew: every so many optimizer steps, or less often.

Steps are counted from 0. Step 0 finds every basis; then a basis is due at ``offset`` (if that is
above 0) and each ``every`` steps after it, so that many weights need not all refresh at one step.

With ``lazy`` the interval grows for a weight whose subspace rests: each refresh tells how much of
the old basis is in the new one; when the last 5 were ``lazy`` or more on average, the interval
doubles and the count begins anew. The measure is the overlap ‖P_oldᵀ P_new‖² / r, corrected for
chance: 1 for the same space, 0 for what two random spaces of rank r in s dimensions share, r / s.

Overlaps stay on the device until the next refresh may be due: no step waits for one.

Source: Q-GaLore (arXiv 2407.08296): five cosines, mean .4, factor 2. Its cosine is that of the
first vector alone, with its sign; a flipped sign or two values that swap read there as "moved".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WINDOW", "RefreshSchedule", "overlap"]

WINDOW = 5
_FACTOR = 2


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """How much two bases [s, r] span the same space: 1 the same, 0 no more than chance."""
    size, rank = new.shape
    shared: Tensor = torch.linalg.matrix_norm(old.t() @ new).square() / rank
    if rank == size:
        return shared
    chance = rank / size
    return (shared - chance) / (1.0 - chance)


class RefreshSchedule:
    """The refresh times of one weight."""

    def __init__(self, *, every: int, offset: int = 0, lazy: float | None = None) -> None:
        if every < 1 or not 0 <= offset < every:
            raise ValueError(f"every is {every} and offset {offset}: give 0 <= offset < every")
        if lazy is not None and not 0.0 < lazy <= 1.0:
            raise ValueError(f"lazy is {lazy}: give an overlap above 0 and at most 1, or None")
        self.every = every
        self._lazy = lazy
        self._first_step = offset or every  # after step 0
        self._next_step = 0  # before it is asked for the first time
        self._overlaps: list[Tensor] = []

    @property
    def is_lazy(self) -> bool:
        """Whether it wants to be told of overlaps."""
        return self._lazy is not None

    def due(self, step: int) -> bool:
        """Whether step ``step`` >= 0 refreshes; to be asked at every step, in order.

        Who asks again, as a run does that resumes in the middle of a step, hears no.
        """
        if not self._next_step:
            self._next_step = self._first_step
            if step == 0:
                return True
        if step < self._next_step:
            return False
        if self._rests():
            # this step was the next one of the old interval
            self._next_step += self.every * (_FACTOR - 1)
            self.every *= _FACTOR
            self._overlaps = []
            if step < self._next_step:
                return False
        while self._next_step <= step:
            self._next_step += self.every
        return True

    def note(self, shared: Tensor) -> None:
        """Take the overlap (0-dim) of a refresh that was made."""
        if self._lazy is not None:
            self._overlaps = [*self._overlaps, shared][-WINDOW:]

    def _rests(self) -> bool:
        if self._lazy is None or len(self._overlaps) < WINDOW:
            return False
        return float(torch.stack(self._overlaps).mean()) >= self._lazy

    def tensors(self) -> dict[str, Tensor]:
        """The overlaps that are held."""
        return {f"overlap_{index}": tensor for index, tensor in enumerate(self._overlaps)}

    def relocate(self, move: Callable[[Tensor], Tensor]) -> None:
        """Take `move` of every overlap in its place."""
        self._overlaps = [move(tensor) for tensor in self._overlaps]

    def state_dict(self) -> dict[str, Any]:
        """Interval, next refresh and overlaps."""
        return {
            "every": self.every,
            "next_step": self._next_step,
            "overlaps": list(self._overlaps),
        }

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device) -> None:
        """Go on where ``state`` was."""
        self.every = int(state["every"])
        self._next_step = int(state["next_step"])
        self._overlaps = [tensor.to(device, copy=True) for tensor in state["overlaps"]]
