"""Maxima per named phase, with phases inside phases.

Between two edges (a phase beginning or ending) the same phases are open, so a maximum read at an
edge belongs to all of them: ``step`` holds the peak of the ``backward`` inside it. Phases that come
again (one per step) share one record, so the memory it takes does not grow with the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter

__all__ = ["PhasePeaks", "PhaseRecord"]


@dataclass(slots=True, kw_only=True)
class PhaseRecord:
    """One phase over the whole run: how often, how long in all, and the largest of each value."""

    num_times: int = 0
    seconds: float = 0.0
    maxima: dict[str, int] = field(default_factory=dict)

    def fold(self, values: Mapping[str, int]) -> None:
        for name, value in values.items():
            self.maxima[name] = max(value, self.maxima.get(name, value))


class PhasePeaks:
    """Folds readings into the phases that are open, and into ``overall``."""

    def __init__(self) -> None:
        self.overall = PhaseRecord(num_times=1)
        self.phases: dict[str, PhaseRecord] = {}
        self._open: list[tuple[str, float]] = []

    def open_phases(self) -> tuple[str, ...]:
        """The phases open now, outermost first."""
        return tuple(name for name, _ in self._open)

    def begin(self, name: str) -> None:
        """Opens a phase. Fold what was read at this edge first: it belongs to the phases before."""
        if not name:
            raise ValueError(f"phase name {name!r} is empty; give the phase a name")
        self.phases.setdefault(name, PhaseRecord())
        self._open.append((name, perf_counter()))

    def end(self, name: str) -> None:
        """Closes the innermost phase, which must be ``name``. Fold this edge's reading first."""
        innermost = self._open[-1][0] if self._open else None
        if innermost != name:
            raise ValueError(
                f"phase {name!r} cannot end: the innermost open phase is {innermost!r}; "
                "end phases in the reverse order of their beginning"
            )
        _, began = self._open.pop()
        record = self.phases[name]
        record.num_times += 1
        record.seconds += perf_counter() - began

    def fold(self, values: Mapping[str, int], *, only: tuple[str, ...] | None = None) -> None:
        """Raises the maxima of the open phases; with ``only``, of those that are named in it too.

        ``only`` is for a reading that took time: the phases open when it began. A phase that began
        or ended meanwhile may not have been the one that was read.
        """
        self.overall.fold(values)
        for name in set(self.open_phases()):
            if only is None or name in only:
                self.phases[name].fold(values)
