"""The one JSON form of every measured or predicted run, and the conditions it was made under."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from memrt.profiling.accounts import Place
from memrt.profiling.timeline import Timeline

__all__ = ["SCHEMA", "conditions", "format_bytes", "timeline_json"]

SCHEMA = "memrt.report/1"

_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "triton", "memrt")


def format_bytes(num_bytes: float) -> str:
    """Bytes for people: 1023 B, 12.3 MiB, 1.24 GiB."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def timeline_json(timeline: Timeline) -> dict[str, Any]:
    """What a ledger counted: the peak and its breakdown, phases, places, the run over time.

    `accounts` and `owners` are bytes on the device at the instant of the peak; accounts sum to
    `peak_bytes`. `account_maxima` are each account's own maximum, at whatever instant it came.
    """
    peak = timeline.peak()
    return {
        **peak.to_json(),
        "phases": timeline.phase_peaks(),
        "place_peaks": {
            place.value: max((live for _, live, _ in timeline.live_bytes(place=place)), default=0)
            for place in Place
        },
        "account_maxima": timeline.account_maxima(),
        "top_allocations": timeline.top_allocations(peak.instant),
        "timeline": timeline.samples(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file lies in; None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def conditions(
    *, settings: Mapping[str, Any], strategies: Sequence[str], device: str
) -> dict[str, Any]:
    """Hardware, versions, commit, date and configuration of a run."""
    import torch

    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "machine": platform.machine(),
        "platform": platform.system(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "strategies": list(strategies),
        **settings,
    }
