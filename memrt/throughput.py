"""Tokens per second of a training run, for its memory report.

Padding, evaluation, saving and the steps under the ledger are left out. Tokens are added up where
they are, so that no step waits for a device to say how many there were.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Throughput"]


class Throughput:
    """Counts tokens and seconds of the steps that it is told of."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0
        self._num_tokens: Tensor | int = 0

    def begin_step(self) -> None:
        """A step begins; from the second on, time runs since the end of the one before."""
        if self._since is None:
            self._since = perf_counter()

    def add(self, inputs: Mapping[str, Any]) -> None:
        """A micro-batch of the step; one without `input_ids` has no tokens."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._num_tokens = self._num_tokens + mask.sum()
        elif isinstance(ids, Tensor):
            self._num_tokens = self._num_tokens + ids.numel()

    def end_step(self) -> None:
        """A step is over."""
        now = perf_counter()
        if self._since is not None:
            self._seconds += now - self._since
        self._since = now

    def restart(self) -> None:
        """What came between two steps, such as an evaluation, is over."""
        if self._since is not None:
            self._since = perf_counter()

    @property
    def tokens_per_second(self) -> float | None:
        """None where every step was counted by the ledger, or nothing had tokens."""
        num_tokens = int(self._num_tokens)
        return num_tokens / self._seconds if num_tokens and self._seconds > 0 else None
