"""Memory, power and utilisation under the names that a training log gives them.

``memory/max_allocated (GiB)``, ``memory/max_active (GiB)`` are the allocator's largest so far,
``memory/device_reserved (GiB)`` what it holds of the device, ``memory/nvml_used (GiB)`` what the
driver last said, ``power/avg (W)`` and ``gpu/util (%)`` means since the last line, ``memory/rss
(GiB)`` this process on the host. 1 GiB = 2**30 bytes. What cannot be had is left out.

A line costs one table of the allocator's counters (CUDA) and one small read of /proc; the driver is
not asked. The first three names are axolotl's.
"""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch

from memrt.profiling.allocator import AllocatorUnavailable, CudaAllocator
from memrt.profiling.monitor_report import RunningStatistics

__all__ = ["LogReader", "SinceLastLine", "allocator_values", "is_log_value", "rss_values"]

_GIB = 2**30
_DECIMALS = 4
_GROUPS = ("memory/", "power/", "gpu/")
_MEANS = {"power_watts": "power/avg (W)", "utilization_percent": "gpu/util (%)"}


def is_log_value(name: str) -> bool:
    """Whether an entry of a log line is one of these."""
    return name.startswith(_GROUPS)


def allocator_values(
    *, peak_allocated_bytes: int, peak_active_bytes: int, reserved_bytes: int
) -> dict[str, float]:
    """What torch's allocator says."""
    return {
        "memory/max_allocated (GiB)": _gib(peak_allocated_bytes),
        "memory/max_active (GiB)": _gib(peak_active_bytes),
        "memory/device_reserved (GiB)": _gib(reserved_bytes),
    }


def rss_values(rss_bytes: int) -> dict[str, float]:
    """What the host says."""
    return {"memory/rss (GiB)": _gib(rss_bytes)}


class SinceLastLine:
    """Sampled series as a log line shows them: the last memory, and means since the last line."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, int]] = {}

    def values(self, series: Mapping[str, RunningStatistics]) -> dict[str, float]:
        """The values of a line; a series without a sample since the last one is left out."""
        found: dict[str, float] = {}
        if "device_used_bytes" in series:
            used = series["device_used_bytes"].result().last
            found["memory/nvml_used (GiB)"] = _gib(used)
        for column, name in _MEANS.items():
            if column not in series:
                continue
            total, count = series[column].totals()
            total_before, count_before = self._before.get(column, (0.0, 0))
            if count > count_before:
                mean = (total - total_before) / (count - count_before)
                found[name] = round(mean, _DECIMALS)
            self._before[column] = (total, count)
        return found


class LogReader:
    """The same values for a run without a monitor: no thread, so neither power nor utilisation."""

    def __init__(self, device: torch.device) -> None:
        self._process = psutil.Process()
        self._allocator: CudaAllocator | None = None
        if device.type == "cuda":
            try:
                self._allocator = CudaAllocator(device)
            except AllocatorUnavailable:
                self._allocator = None

    def values(self) -> dict[str, float]:
        """The values of a line; the allocator's largest are of the process."""
        found: dict[str, float] = {}
        if self._allocator is not None:
            reading = self._allocator.read()
            found |= allocator_values(
                peak_allocated_bytes=reading.peak_allocated_bytes,
                peak_active_bytes=reading.peak_active_bytes,
                reserved_bytes=reading.reserved_bytes,
            )
        return found | rss_values(self._process.memory_info().rss)


def _gib(num_bytes: float) -> float:
    return round(num_bytes / _GIB, _DECIMALS)
