"""A light monitor for a whole run: a thread that samples NVML and RSS, and peaks at phase edges.

::

    with Monitor() as monitor:
        for batch in batches:
            with monitor.phase("forward"): ...
            with monitor.phase("backward"): ...
    monitor.report().to_json()

The thread reads the device's used bytes every 20 ms, and what takes the driver longer (this
process's share, power, utilisation, temperature) every 100 ms; without NVML it reads RSS alone
every 250 ms, and the report says why. Spikes between samples are not lost: at every phase edge the
allocator's peak counters and the kernel's RSS high-water mark are read (see ``allocator`` and
``monitor_probes``). The driver is not asked at an edge, where training would have to wait for it.

Cost: the thread limits itself to 0.5 % of a core by sampling more rarely, and reports what it took;
an edge without a device took 0.02 ms (2-core x86 virtual machine, Python 3.11). Memory does not
grow with the run. Energy is the card's own counter where it has one, else power over time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from memrt.profiling.allocator import AllocatorPhases, AllocatorSource
from memrt.profiling.monitor_probes import DeviceProbe
from memrt.profiling.monitor_report import MonitorReport
from memrt.profiling.monitor_run import MonitoredRun
from memrt.profiling.nvml import DeviceAddress, address_of_torch_device

__all__ = ["Monitor", "MonitorReport"]

_NVML_INTERVAL_SECONDS = 0.02
_RSS_INTERVAL_SECONDS = 0.25
_SENSOR_INTERVAL_SECONDS = 0.1


class Monitor:
    """Samples one run at a time; start and stop it, or use it as a context manager.

    ``device`` is torch's CUDA device (the current one when None and there is one), a CPU device for
    RSS alone, or an NVML address. ``allocator`` replaces torch's counters for that device, and is
    the only way to have any with an NVML address. Phases belong to the thread that runs training.
    """

    def __init__(
        self,
        *,
        device: DeviceAddress | torch.device | str | int | None = None,
        allocator: AllocatorSource | None = None,
        interval_seconds: float | None = None,
        sensor_interval_seconds: float = _SENSOR_INTERVAL_SECONDS,
    ) -> None:
        for name, value in (
            ("interval_seconds", interval_seconds),
            ("sensor_interval_seconds", sensor_interval_seconds),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} is not positive; give seconds between samples")
        self._device = torch.device(device) if isinstance(device, str) else device
        self._allocator = allocator
        self._interval_seconds = interval_seconds
        self._sensor_interval_seconds = sensor_interval_seconds
        self._run: MonitoredRun | None = None
        self._report: MonitorReport | None = None

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Takes the baseline and begins to sample. A stopped monitor may start again, anew."""
        if self._run is not None:
            raise RuntimeError("the monitor is running; stop() it before it starts again")
        self._report = None
        address, torch_index, reason = self._resolve_device()
        probe = DeviceProbe(address, unavailable=reason)
        interval = self._interval_seconds
        if interval is None:
            interval = _NVML_INTERVAL_SECONDS if probe.available else _RSS_INTERVAL_SECONDS
        self._run = MonitoredRun(
            device=probe,
            allocator=self._open_allocator(torch_index, reason),
            interval_seconds=interval,
            sensor_interval_seconds=self._sensor_interval_seconds,
        )
        self._run.start()

    def stop(self) -> MonitorReport:
        """Ends sampling and gives the report; a second call gives the same report again."""
        if self._run is not None:
            run, self._run = self._run, None
            self._report = run.stop()
        return self.report()

    def report(self) -> MonitorReport:
        """The report up to now while running, afterwards that of the last run."""
        if self._run is not None:
            return self._run.report()
        if self._report is None:
            raise RuntimeError("the monitor has not been started; call start() first")
        return self._report

    def log_values(self) -> dict[str, float]:
        """What a line of a training log shows of now; nothing before start() and after stop()."""
        return {} if self._run is None else self._run.log_values()

    def begin_phase(self, name: str) -> None:
        """Marks a phase's beginning where a with-block does not fit, such as in callbacks."""
        self._running().begin_phase(name)

    def end_phase(self, name: str) -> None:
        """Marks the end of the innermost phase, which must be ``name``."""
        self._running().end_phase(name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase around a block. Phases nest; an outer one holds the peaks of the inner."""
        run = self._running()
        run.begin_phase(name)
        try:
            yield
        finally:
            run.end_phase(name)

    def _running(self) -> MonitoredRun:
        if self._run is None:
            raise RuntimeError("the monitor is not running; call start() before naming phases")
        return self._run

    def _open_allocator(self, torch_index: int | None, reason: str | None) -> AllocatorPhases:
        if self._allocator is not None:
            return AllocatorPhases(self._allocator)
        if torch_index is not None:
            return AllocatorPhases.for_device(torch_index)
        unknown = "the device was named by its NVML address, and its torch index is not known"
        return AllocatorPhases(None, unavailable=reason or unknown)

    def _resolve_device(self) -> tuple[DeviceAddress | None, int | None, str | None]:
        """NVML address, torch index, and the reason where there is no address."""
        device = self._device
        if isinstance(device, DeviceAddress):
            return device, None, None
        if device is None and not torch.cuda.is_available():
            return None, None, "torch sees no CUDA device, so host memory (RSS) is what is watched"
        if isinstance(device, torch.device) and device.type != "cuda":
            return (
                None,
                None,
                (f"the run is on {device.type!r}, so host memory (RSS) is what is watched"),
            )
        index = device.index if isinstance(device, torch.device) else device
        if index is None:
            index = torch.cuda.current_device()
        return address_of_torch_device(index), index, None
