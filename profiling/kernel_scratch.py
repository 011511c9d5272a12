"""What an operator allocates and frees inside itself, on CPU: the bytes that no ledger can see.

A ledger sees an operator from outside: its outputs. torch's profiler notes every allocation of the
CPU allocator, and which operator ran. For each call of an operator that a dispatch mode would see,

    scratch = largest sum of its allocations so far - their sum at its end,

so that outputs do not count, and scratch that is freed before an output of its size is made does
not either: it raises no peak. Operators of memrt's own say what they need (`register_workspace`)
and are counted by the ledger, so they are left out here. The profiler's trace is read from its
documented export, which costs some seconds and a temporary file for a step of a large model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["largest_scratch", "scratch_of"]

_OWN = "memrt::"


class _SeenOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of the operators that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def largest_scratch(step: Callable[[], None]) -> dict[str, Any]:
    """Run `step` twice, once to see its operators, once under the profiler."""
    with _SeenOperators() as seen:
        step()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    by_operator = scratch_of(events, {name for name in seen.names if not name.startswith(_OWN)})
    ordered = sorted(by_operator.items(), key=lambda item: (-item[1], item[0]))
    return {
        "largest_bytes": ordered[0][1] if ordered else 0,
        "operator": ordered[0][0] if ordered else None,
        "by_operator": dict(ordered[:10]),
    }


def scratch_of(events: Sequence[Mapping[str, Any]], operators: set[str]) -> dict[str, int]:
    """The largest scratch of each operator that has some, from a Chrome trace's events."""
    calls = sorted(
        (event["tid"], event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("ph") == "X" and event["name"] in operators
    )
    changes = sorted(
        (event["tid"], event["ts"], event["args"]["Bytes"])
        for event in events
        if event["name"] == "[memory]" and event["args"].get("Device Type") == 0
    )
    largest: dict[str, int] = {}
    position = 0
    outer_end = (None, -1.0)
    for thread, began, ended, name in calls:
        if outer_end[0] == thread and began < outer_end[1]:
            continue  # inside a call that a dispatch mode sees: part of its scratch
        outer_end = (thread, ended)
        while position < len(changes) and changes[position][:2] < (thread, began):
            position += 1
        held = highest = 0
        while position < len(changes) and changes[position][:2] <= (thread, ended):
            held += changes[position][2]
            highest = max(highest, held)
            position += 1
        scratch = highest - max(held, 0)
        if scratch > 0:
            largest[name] = max(largest.get(name, 0), scratch)
    return largest
