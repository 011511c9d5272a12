"""What every strategy of a stack saves: the waterfall, from one plan for each step of it.

Two numbers a strategy, for their sum depends on the order: `step_bytes`, what the peak falls by
when it is added to those before it, in phase order; and `saved_bytes`, the peak without it minus
the peak with it, the others staying. A stack that cannot run (an adapter without its quantised
base, say) has no peak, and says why. Costs a plan for each of at most 2 n stacks of n strategies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memrt.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memrt.strategy import Strategy

__all__ = ["waterfall"]


def waterfall(
    strategies: Sequence[Strategy], peak_of: Callable[[list[Strategy]], int]
) -> list[dict[str, Any]]:
    """Rows from no strategy to all of them: `strategy`, `peak_bytes`, `step_bytes`, `saved_bytes`.

    `peak_of` plans a stack; the `ConflictError` or `ValueError` of one that cannot run becomes the
    row's `reason`.
    """
    ordered = sorted(strategies, key=lambda strategy: strategy.phase)
    peaks: dict[tuple[str, ...], tuple[int | None, str | None]] = {}

    def peak(stack: list[Strategy]) -> tuple[int | None, str | None]:
        key = tuple(map(str, stack))
        if key not in peaks:
            try:
                peaks[key] = peak_of(stack), None
            except (ConflictError, ValueError) as error:
                peaks[key] = None, " ".join(str(error).split())
        return peaks[key]

    whole, _ = peak(ordered)
    rows: list[dict[str, Any]] = []
    before, reason = peak([])
    rows.append(_row("none", before, reason))
    for index, strategy in enumerate(ordered):
        found, reason = peak(ordered[: index + 1])
        row = _row(str(strategy), found, reason)
        row["step_bytes"] = None if found is None or before is None else before - found
        without, why = peak([other for other in ordered if other is not strategy])
        row["saved_bytes"] = None if without is None or whole is None else without - whole
        row["reason"] = row["reason"] or why
        rows.append(row)
        before = found
    return rows


def _row(label: str, peak_bytes: int | None, reason: str | None) -> dict[str, Any]:
    return {
        "strategy": label,
        "peak_bytes": peak_bytes,
        "step_bytes": None,
        "saved_bytes": None,
        "reason": reason,
    }
