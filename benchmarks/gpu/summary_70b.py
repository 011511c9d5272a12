"""What the 70B part came to: the stacks beside their plans and beside QLoRA, and the bounds.

The bounds are the ladder's: weights, gradients and optimizer state at most 40 GiB, what the process
had on the device at its peak (NVML; the allocator where it does not tell) at most 48 GiB, and at
least 2.5 times QLoRA's tokens a second in the same run. They are judged on NF4 weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.gpu.tables import GIB, aligned, gib, number, own_bytes

__all__ = ["KEPT_GIB", "PEAK_GIB", "TIMES_QLORA", "lines", "section"]

KEPT_GIB, PEAK_GIB, TIMES_QLORA = 40, 48, 2.5
JUDGED, QLORA = "ladder nf4", "QLoRA"

Rows = Mapping[str, Mapping[str, Any]]
Compare = Callable[[Mapping[str, Any], Mapping[str, Any] | None], dict[str, Any]]


def section(rows: Rows, plans: Rows, compare: Compare) -> dict[str, Any]:
    """Compared rows, QLoRA's, and whether the bounds are kept; empty where the part did not run."""
    if not rows:
        return {}
    trained = {key: row for key, row in rows.items() if "plan_key" in row}
    compared = [
        {
            **compare(row, plans.get(row["plan_key"])),
            "case": key,
            "kept_bytes": row["kept_bytes"],
            "loading": row["loading"],
        }
        for key, row in trained.items()
    ]
    peer = rows.get(QLORA, {})
    speed = peer.get("tokens_per_second")
    for row in compared:
        row["times_qlora"] = None if speed is None else row["tokens_per_second"] / speed
    met, reason = _judged(next((row for row in compared if row["case"] == JUDGED), None))
    blocks = [row["case"] for row in compared if row["loading"].get("at_most_one_block") is False]
    if blocks:
        met, reason = False, f"{reason}; loading took more than a block beside {', '.join(blocks)}"
    return {"rows": compared, "qlora": dict(peer), "met": met, "reason": reason}


def _judged(row: Mapping[str, Any] | None) -> tuple[bool | None, str]:
    if row is None:
        return None, "70B: the ladder on NF4 weights did not run"
    peak = row["process_bytes"] or row["reserved_bytes"]
    times = row["times_qlora"]
    reason = (
        f"70B ladder: keeps {gib(row['kept_bytes'])} GiB (at most {KEPT_GIB}), peak {gib(peak)} "
        f"(at most {PEAK_GIB}), {number(times, '.2f')} x QLoRA's tokens/s (at least {TIMES_QLORA})"
    )
    if peak is None or times is None:
        return None, reason
    kept = row["kept_bytes"] <= KEPT_GIB * GIB and peak <= PEAK_GIB * GIB
    return kept and times >= TIMES_QLORA, reason


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """GiB of the plan, the ledger, the allocator and the driver, and tokens a second."""
    yield "70B, GiB"
    header = (
        *("case", "kept", "plan", "ledger", "allocated", "expected", "NVML", "beside loading"),
        *("tok/s", "x QLoRA"),
    )
    table = [header]
    for row in found["rows"]:
        table.append(
            (
                row["case"],
                gib(row["kept_bytes"]),
                gib(row.get("predicted_rounded_bytes")),
                gib(row["counted_rounded_bytes"]),
                gib(row["allocated_bytes"]),
                gib(row.get("expected_device_bytes")),
                gib(row["process_bytes"]),
                gib(row["loading"].get("beside_result_bytes")),
                number(row["tokens_per_second"], ",.0f"),
                number(row["times_qlora"], ".2f"),
            )
        )
    peer = found["qlora"]
    if peer.get("tokens_per_second") is not None:
        phases, driver = peer["allocator_phases"], peer["driver"]
        speed = number(peer["tokens_per_second"], ",.0f")
        peaks = (gib(phases.get("train")), "-", gib(own_bytes(driver)))
        table.append((QLORA, "-", "-", "-", *peaks, "-", speed, "1.00"))
    yield from aligned(table)
    if peer.get("reason"):
        yield f"  {QLORA}: {peer['status']}: {peer['reason']}"
