"""The form of committed results: one JSON for one benchmark and one kind of machine.

    schema           "memrt.benchmark/1"
    name             the benchmark's folder
    claim, goal      one sentence each; the goal is what the verdict is about
    verdict          "met", "missed" or "not judged", and `verdict_reason` with the numbers
    conditions       hardware, versions, commit and whether the tree had other changes, date,
                     configuration
    summary          medians with their spread, or a table
    repetitions      every raw number behind the summary

Bytes are integers, times are seconds. A file is whole or it is not there.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memrt.profiling.whole_file import write_whole

__all__ = [
    "RESULTS",
    "ROOT",
    "SCHEMA",
    "VERDICTS",
    "check_record",
    "conditions",
    "device_slug",
    "make_record",
    "plain",
    "spread",
    "write_json",
    "write_record",
]

SCHEMA = "memrt.benchmark/1"
VERDICTS = ("met", "missed", "not judged")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

COMMIT_VARIABLE = "MEMRT_COMMIT"
"""Names the commit where the checkout travels without `.git`."""

_CONDITIONS = ("device", "cpu", "cores", "packages", "commit", "dirty", "date", "configuration")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and count."""
    if not values:
        raise ValueError("spread() of no values; measure at least once")
    middle = statistics.median(values)
    lower, _, upper = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [middle] * 3
    )
    return {
        "median": middle,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The checkout's commit: from the environment, from git, else "unknown"."""
    return os.environ.get(COMMIT_VARIABLE) or _git("rev-parse", "--short=12", "HEAD") or "unknown"


def dirty() -> bool | None:
    """Whether the tree differs from its commit, results aside; None where nobody can tell."""
    if os.environ.get(COMMIT_VARIABLE):
        return None
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return None if changes is None else bool(changes)


def cpu_model() -> str:
    """The processor's name, as the kernel has it."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def conditions(*, configuration: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Hardware, versions, commit, date and configuration, of this process on `device`."""
    import psutil

    from memrt.profiling import report

    found = report.conditions(settings={}, strategies=[], device=device)
    del found["strategies"]
    return {
        **found,
        "commit": commit(),
        "dirty": dirty(),
        "cpu": cpu_model(),
        "cores": cores(),
        "host_memory_bytes": psutil.virtual_memory().total,
        # what else ran on the machine shortly before: processes that were ready, one minute's mean
        "load_average": round(os.getloadavg()[0], 2),
        "configuration": dict(configuration),
    }


def device_slug(found: Mapping[str, Any]) -> str:
    """What the file name says of the machine: the GPU, else processor and cores."""
    on_cpu = found["device"] == "cpu"
    name = f"{found['cpu']} {found['cores']} cores" if on_cpu else str(found["device"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def make_record(
    *,
    name: str,
    claim: str,
    goal: str,
    found: Mapping[str, Any],
    outcome: Mapping[str, Any],
) -> dict[str, Any]:
    """A record from a benchmark's `outcome`: `repetitions`, `summary`, `met` and `reason`."""
    met = outcome["met"]
    record = {
        "schema": SCHEMA,
        "name": name,
        "claim": claim,
        "goal": goal,
        "verdict": "not judged" if met is None else "met" if met else "missed",
        "verdict_reason": outcome["reason"],
        "conditions": dict(found),
        "summary": outcome["summary"],
        "repetitions": outcome["repetitions"],
    }
    check_record(record)
    return record


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse with `ValueError` what is not a record of this schema."""
    if record.get("schema") != SCHEMA:
        raise ValueError(f"schema={record.get('schema')!r}: this reads {SCHEMA!r}")
    for key in ("name", "claim", "goal", "verdict_reason"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise ValueError(f"{key}={record.get(key)!r}: must be a sentence")
    if record.get("verdict") not in VERDICTS:
        raise ValueError(f"verdict={record.get('verdict')!r}: use one of {', '.join(VERDICTS)}")
    found = record.get("conditions")
    missing = [key for key in _CONDITIONS if not isinstance(found, Mapping) or key not in found]
    if missing:
        raise ValueError(f"conditions lack {', '.join(missing)}; a number says nothing without")
    for key in ("summary", "repetitions"):
        if not record.get(key):
            raise ValueError(f"{key} is empty; keep the raw numbers and what they come to")


def plain(value: Any) -> Any:
    """JSON values only: numbers that JSON does not have (NaN, infinity) become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write so that `path` holds the old text or the whole new one."""
    text = json.dumps(plain(value), indent=1, allow_nan=False) + "\n"
    write_whole(path, text.encode())


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `<name>-<device>.json` into `folder`, in place of an older result of that machine."""
    check_record(record)
    path = folder / f"{record['name']}-{device_slug(record['conditions'])}.json"
    write_json(path, record)
    return path
