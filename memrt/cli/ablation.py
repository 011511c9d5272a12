"""`memrt profile --ablate`: what every strategy saves, predicted and measured side by side.

Every stack of the waterfall (`memrt.waterfall`) is planned, and trained for real: from the same
start weights, on the same batches, two steps under the ledger and, on CUDA, one more without it for
the allocator's own peak, because a ledger changes when autograd frees a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from memrt.waterfall import waterfall

if TYPE_CHECKING:
    from memrt.measure import Workload
    from memrt.strategy import Strategy

__all__ = ["ablation"]

_NUMBERS = ("peak_bytes", "step_bytes", "saved_bytes")


def ablation(
    strategies: Sequence[Strategy],
    workload: Workload,
    planned_peak_of: Callable[[list[Strategy]], int],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of the waterfall, each with its numbers `predicted`, `counted` and `allocated`.

    `difference_bytes` is counted minus predicted, of the peak and of what the strategy saves.
    `allocated` is None where there is no CUDA.
    """
    from memrt.measure import measured_peaks

    measured: dict[str, dict[str, int | None]] = {}

    def measure(stack: list[Strategy]) -> dict[str, int | None]:
        label = "+".join(map(str, stack)) or "none"
        if label not in measured:
            say(f"training {label}")
            try:
                measured[label] = measured_peaks(workload, stack)
            except MemoryError as error:
                raise ValueError(str(error)) from error
        return measured[label]

    def of(source: str) -> Callable[[list[Strategy]], int]:
        return lambda stack: int(measure(stack)[source] or 0)

    columns = {
        "predicted": waterfall(strategies, planned_peak_of),
        "counted": waterfall(strategies, of("counted")),
    }
    if workload.device.type == "cuda":
        columns["allocated"] = waterfall(strategies, of("allocated"))
    return [_row(index, columns) for index in range(len(columns["predicted"]))]


def _row(index: int, columns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    found = {name: rows[index] for name, rows in columns.items()}
    reasons = (row["reason"] for row in found.values())
    values: dict[str, Any] = {
        name: {number: row[number] for number in _NUMBERS} for name, row in found.items()
    }
    return {
        "strategy": found["predicted"]["strategy"],
        "allocated": None,
        **values,
        "difference_bytes": {
            number: _difference(found["counted"][number], found["predicted"][number])
            for number in _NUMBERS
        },
        "reason": next((reason for reason in reasons if reason), None),
    }


def _difference(counted: int | None, predicted: int | None) -> int | None:
    return None if counted is None or predicted is None else counted - predicted
