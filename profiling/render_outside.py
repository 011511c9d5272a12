"""The sections on what a run needs outside its steps: predicted, and watched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memrt.profiling.render import Column, Section
from memrt.profiling.render_sections import bytes_table

__all__ = ["outside_sections", "watched_sections"]

Report = Mapping[str, Any]

_ORDER = ("load", "resume", "counted", "forward", "backward", "step", "evaluate", "save")


def outside_sections(report: Report) -> list[Section]:
    """Of a plan; none of an earlier version's."""
    outside = report.get("outside")
    if not outside:
        return []
    rows = [[name, peaks["device"], peaks["host"]] for name, peaks in outside.items()]
    columns = [
        Column(title="outside the steps"),
        Column(title="device", kind="bytes"),
        Column(title="host", kind="bytes"),
    ]
    table = bytes_table(columns, rows)
    return [
        Section(
            title=f"Loading, evaluating, saving, resuming ({table.unit})",
            table=table,
            after=[
                "Evaluation: a batch as in training. Saving: from a GPU; a CPU run writes its "
                "tensors where they are."
            ],
        )
    ]


def watched_sections(report: Report) -> list[Section]:
    """Of a training run: every phase's peaks as they were seen from outside, beside the plan's."""
    phases = (report["monitor"] or {}).get("phases")
    if not phases:
        return []
    predicted = (report["predicted"] or {}).get("outside") or {}
    names = sorted(phases, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    columns = [Column(title="phase"), Column(title="times", kind="count")]
    rows: list[list[Any]] = [[name, phases[name]["num_times"]] for name in names]
    values = {
        "predicted": [predicted.get(name, {}).get("device") for name in names],
        "allocator": [phases[name]["allocated_peak_bytes"] for name in names],
        "NVML": [phases[name]["process_used_peak_bytes"] for name in names],
        "RSS": [phases[name]["rss_peak_bytes"] for name in names],
    }
    for title, found in values.items():
        if any(value is not None for value in found):
            columns.append(Column(title=title, kind="bytes"))
            for row, value in zip(rows, found, strict=True):
                row.append(value)
    table = bytes_table(columns, rows)
    return [
        Section(
            title=f"Peak of every phase ({table.unit})",
            before=[
                "As the monitor saw it; `counted` are the steps under the ledger, evaluation and "
                "saving are whole."
            ],
            table=table,
            file_only=True,
        )
    ]
