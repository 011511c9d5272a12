"""What the monitor reads at one instant: the host through psutil, the device through NVML.

Host: resident set size (RSS) of this process, without its children. A sample misses what rises and
falls between two samples; the kernel's high-water mark does not, so whenever that mark has risen
since the last reading, the peak in between is the mark, to the page.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from time import perf_counter, process_time
from typing import Any, BinaryIO

import psutil

from memrt.profiling.nvml import DeviceAddress, DeviceReading, Nvml, NvmlDevice, NvmlUnavailable

__all__ = ["DeviceProbe", "HostProbe", "PowerIntegral", "values_of"]

_STATUS = re.compile(rb"^VmHWM:\s+(?P<mark>\d+) kB\nVmRSS:\s+(?P<rss>\d+) kB$", re.MULTILINE)
_STATUS_BYTES = 4096
_SENSORS = (
    "process_used_bytes",
    "utilization_percent",
    "power_watts",
    "temperature_celsius",
)


class HostProbe:
    """RSS and processor use of this process."""

    def __init__(self) -> None:
        self._memory = _HostMemory()
        self._high_water = self._memory.read()[1]
        self._cpu_before = process_time()
        self._wall_before = perf_counter()

    def rss_and_peak(self) -> tuple[int, int]:
        """RSS now, and the largest it was since the last call as far as can be known."""
        rss, high_water = self._memory.read()
        peak = max(rss, high_water) if high_water > self._high_water else rss
        self._high_water = high_water
        return rss, peak

    def cpu_percent(self) -> float | None:
        """Processor time over wall time since the last call, 100 for one core; None at once."""
        cpu, wall = process_time(), perf_counter()
        elapsed = wall - self._wall_before
        percent = 100.0 * (cpu - self._cpu_before) / elapsed if elapsed > 1e-3 else None
        if percent is not None:
            self._cpu_before, self._wall_before = cpu, wall
        return percent

    def close(self) -> None:
        """Nothing can be read afterwards."""
        self._memory.close()


class DeviceProbe:
    """One NVML device, or the reason why there is none; losing the device is not an error."""

    def __init__(self, address: DeviceAddress | None, *, unavailable: str | None = None) -> None:
        self.unavailable = unavailable
        self.name: str | None = None
        self.driver_version: str | None = None
        self.missing: dict[str, str] = {}
        self._nvml: Nvml | None = None
        self._device: NvmlDevice | None = None
        if address is None:
            return
        try:
            self._nvml = Nvml()
            self._device = self._nvml.device(address)
            self.name = self._device.name
            self.driver_version = self._nvml.driver_version()
        except NvmlUnavailable as error:
            self._lose(error.reason)

    @property
    def available(self) -> bool:
        return self._device is not None

    def read_all(self) -> DeviceReading | None:
        """Every column; None without a device."""
        device = self._device
        if device is None:
            return None
        try:
            reading = device.read()
        except NvmlUnavailable as error:
            self._lose(f"lost during the run: {error.reason}")
            return None
        self.missing.update(reading.unavailable)
        return reading

    def read(self, *, sensors: bool) -> dict[str, float]:
        """Used bytes, and with ``sensors`` what takes the driver longer; the columns there are."""
        if sensors:
            return values_of(self.read_all())
        device = self._device
        if device is None:
            return {}
        try:
            used = device.read_device_used_bytes()
        except NvmlUnavailable as error:
            self._lose(f"lost during the run: {error.reason}")
            return {}
        return {} if used is None else {"device_used_bytes": used}

    def close(self) -> None:
        if self._nvml is not None:
            self._nvml.close()
        self._nvml = self._device = None

    def _lose(self, reason: str) -> None:
        # Both threads can meet the same loss; the later one only sees that the library is closed.
        if self.unavailable is None:
            self.unavailable = reason
        self.close()


def values_of(reading: DeviceReading | None) -> dict[str, float]:
    """The sampled columns of a reading, without those that are None."""
    if reading is None:
        return {}
    values = {name: getattr(reading, name) for name in ("device_used_bytes", *_SENSORS)}
    return {name: value for name, value in values.items() if value is not None}


class PowerIntegral:
    """Energy from power samples by trapezoids, for cards without an energy counter."""

    def __init__(self) -> None:
        self.joules = 0.0
        self.num_samples = 0
        self._seconds = self._watts = 0.0

    def add(self, watts: float, *, seconds: float) -> None:
        if self.num_samples:
            self.joules += 0.5 * (self._watts + watts) * max(0.0, seconds - self._seconds)
        self.num_samples += 1
        self._seconds, self._watts = seconds, watts


class _HostMemory:
    """RSS and the largest RSS that this process ever had, as the operating system keeps them.

    Linux keeps two marks: VmHWM is this program's own, and getrusage's begins with what the process
    that started it had, so that a small program under a large one never passes it. One file holds
    RSS and VmHWM; it is kept open, for a sample must not slow down what it watches.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._status: BinaryIO | None = None
        if sys.platform == "linux":
            with suppress(OSError):  # a container without /proc
                self._status = open("/proc/self/status", "rb", buffering=0)  # noqa: SIM115

    def read(self) -> tuple[int, int]:
        """RSS and its high-water mark, in bytes."""
        if self._status is not None:
            found = _STATUS.search(os.pread(self._status.fileno(), _STATUS_BYTES, 0))
            if found is not None:
                return int(found["rss"]) * 1024, int(found["mark"]) * 1024
        memory = self._process.memory_info()
        return int(memory.rss), self._mark(memory)

    def close(self) -> None:
        if self._status is not None:
            self._status.close()

    def _mark(self, memory: Any) -> int:
        if sys.platform == "win32":
            return int(memory.peak_wset)
        import resource

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024
