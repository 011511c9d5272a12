"""One monitored run: the sampling thread, the phase edges, and the report made of both.

A device reading is taken outside the lock, so that training never waits for the driver at an edge;
it counts for the phases that were open both when it began and when it is booked, so that no phase
is given another's peak. RSS, read in microseconds, is read under the lock.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from time import perf_counter, process_time, thread_time
from typing import Literal

from memrt.profiling.allocator import AllocatorPeaks, AllocatorPhases, Reconciliation, reconcile
from memrt.profiling.log_values import SinceLastLine, allocator_values, rss_values
from memrt.profiling.monitor_probes import DeviceProbe, HostProbe, PowerIntegral, values_of
from memrt.profiling.monitor_report import (
    MonitorReport,
    PhaseReport,
    RunningStatistics,
    SeriesStatistics,
)
from memrt.profiling.nvml import DeviceReading
from memrt.profiling.phase_peaks import PhasePeaks, PhaseRecord

__all__ = ["MonitoredRun", "pause_seconds"]

_DEVICE_COLUMNS = (
    "device_used_bytes",
    "process_used_bytes",
    "utilization_percent",
    "power_watts",
    "temperature_celsius",
)
_DEVICE_BYTES = _DEVICE_COLUMNS[:2]

_LARGEST_CPU_SHARE = 0.005
_LONGEST_PAUSE_SECONDS = 2.0
_JOIN_SECONDS = 10.0


def pause_seconds(*, interval: float, cpu: float, elapsed: float) -> float:
    """How long the sampler rests: the interval, or longer while it is above its share of a core."""
    until_within_share = cpu / _LARGEST_CPU_SHARE - elapsed
    return max(interval, min(until_within_share, _LONGEST_PAUSE_SECONDS))


class MonitoredRun:
    """Everything that one run collects."""

    def __init__(
        self,
        *,
        device: DeviceProbe,
        allocator: AllocatorPhases,
        interval_seconds: float,
        sensor_interval_seconds: float,
    ) -> None:
        self._device = device
        self._host = HostProbe()
        self._allocator = allocator
        self._interval_seconds = interval_seconds
        self._sensor_interval_seconds = sensor_interval_seconds
        self._lock = threading.Lock()
        self._peaks = PhasePeaks()
        self._series: dict[str, RunningStatistics] = {}
        self._power = PowerIntegral()
        self._since_last_line = SinceLastLine()
        self._num_samples = 0
        self._sampler_cpu_seconds = 0.0
        self._failure: str | None = None
        self._stop_requested = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memrt-monitor", daemon=True)

    def start(self) -> None:
        """Takes the baseline and starts the thread."""
        reading = self._allocator.edge()
        self._reserved_before = 0 if reading is None else reading.reserved_bytes
        self._began, self._cpu_began = perf_counter(), process_time()
        self._first = self._device.read_all()
        self._book(values_of(self._first), only=())
        self._baseline = {
            name: int(statistics.result().last)
            for name, statistics in self._series.items()
            if name.endswith("_bytes")
        }
        self._thread.start()

    def stop(self) -> MonitorReport:
        """Ends the thread, closes what is open, and reports."""
        self._stop_requested.set()
        self._thread.join(timeout=_JOIN_SECONDS)
        ended = not self._thread.is_alive()
        if not ended:
            self._failure = f"the sampling thread did not end in {_JOIN_SECONDS:.0f} s"
        for name in reversed(self._peaks.open_phases()):
            self.end_phase(name)
        report = self.report()
        if ended:
            self._device.close()
            self._host.close()
        return report

    def begin_phase(self, name: str) -> None:
        """An edge: what was read until here belongs to the phases before."""
        self._allocator.begin(name)
        with self._lock:
            self._fold_rss()
            self._peaks.begin(name)

    def end_phase(self, name: str) -> None:
        """An edge: what was read until here belongs to ``name`` too."""
        self._allocator.end(name)
        with self._lock:
            self._fold_rss()
            self._peaks.end(name)

    def log_values(self) -> dict[str, float]:
        """What a line of a training log shows; the driver is not asked."""
        largest = self._allocator.maxima()
        with self._lock:
            values = self._since_last_line.values(self._series)
            values |= rss_values(self._fold_rss())
        if largest is not None:
            values |= allocator_values(
                peak_allocated_bytes=largest["peak_allocated_bytes"],
                peak_active_bytes=largest["peak_active_bytes"],
                reserved_bytes=largest["reserved_bytes"],
            )
        return values

    def report(self) -> MonitorReport:
        """The report up to now, after one more sample."""
        last = self._device.read_all()
        self._book(values_of(last), only=self._peaks.open_phases())
        allocator = self._allocator.peaks()
        with self._lock:
            series = {name: statistics.result() for name, statistics in self._series.items()}
            largest = dict(self._peaks.overall.maxima)
            phases = {
                name: _phase_report(record, {} if allocator is None else allocator.phases[name])
                for name, record in self._peaks.phases.items()
            }
        process_peak, process_source = self._process_peak(largest)
        energy, energy_source = self._energy(last)
        at_peak, at_end = self._splits(allocator, largest, values_of(last))
        return MonitorReport(
            source="rss" if self._first is None else "nvml",
            duration_seconds=perf_counter() - self._began,
            interval_seconds=self._interval_seconds,
            num_samples=self._num_samples,
            sampler_cpu_seconds=self._sampler_cpu_seconds,
            process_cpu_seconds=process_time() - self._cpu_began,
            series=series,
            baseline=self._baseline,
            rss_peak_bytes=largest["rss_bytes"],
            process_peak_bytes=process_peak,
            process_source=process_source,
            peak_delta_bytes=self._peak_deltas(largest),
            phases=phases,
            energy_joules=energy,
            energy_source=energy_source,
            allocator=allocator,
            at_peak=at_peak,
            at_end=at_end,
            device_name=self._device.name,
            driver_version=self._device.driver_version,
            unavailable=self._unavailable(series, energy),
            flags=self._flags(process_source),
            failure=self._failure,
        )

    def _sample(self) -> None:
        began = next_sensors = perf_counter()
        pause = self._interval_seconds
        try:
            while not self._stop_requested.wait(pause):
                now = perf_counter()
                sensors = now >= next_sensors
                if sensors:
                    next_sensors = now + self._sensor_interval_seconds
                open_before = self._peaks.open_phases()
                self._book(self._device.read(sensors=sensors), only=open_before)
                self._sampler_cpu_seconds = thread_time()
                pause = pause_seconds(
                    interval=self._interval_seconds,
                    cpu=self._sampler_cpu_seconds,
                    elapsed=perf_counter() - began,
                )
        except BaseException as error:
            # Training goes on without samples: the report tells, and raising prints the traceback.
            self._failure = f"sampling stopped: {type(error).__name__}: {error}"
            raise

    def _book(self, device_values: dict[str, float], *, only: tuple[str, ...]) -> None:
        with self._lock:
            values = {**device_values, "rss_bytes": self._fold_rss()}
            cpu_percent = self._host.cpu_percent()
            if cpu_percent is not None:
                values["cpu_percent"] = cpu_percent
            for name, value in values.items():
                self._series.setdefault(name, RunningStatistics()).add(value)
            device_bytes = {n: int(values[n]) for n in _DEVICE_BYTES if n in values}
            self._peaks.fold(device_bytes, only=only)
            if "power_watts" in values:
                self._power.add(values["power_watts"], seconds=perf_counter())
            self._num_samples += 1

    def _fold_rss(self) -> int:
        rss, peak = self._host.rss_and_peak()
        self._peaks.fold({"rss_bytes": peak})
        return rss

    def _others_baseline(self) -> int | None:
        """What the device held beside this process before the run, as far as can be known."""
        if "device_used_bytes" not in self._baseline:
            return None
        own = self._baseline.get("process_used_bytes", self._reserved_before)
        return max(0, self._baseline["device_used_bytes"] - own)

    def _process_peak(
        self, largest: dict[str, int]
    ) -> tuple[int | None, Literal["listed", "device delta"] | None]:
        if "process_used_bytes" in largest:
            return largest["process_used_bytes"], "listed"
        others = self._others_baseline()
        if others is None:
            return None, None
        return max(0, largest["device_used_bytes"] - others), "device delta"

    def _peak_deltas(self, largest: dict[str, int]) -> dict[str, int]:
        # A process that NVML lists only later held nothing on the device at the baseline.
        baseline = {"process_used_bytes": 0, **self._baseline}
        return {
            name: max(0, peak - baseline[name])
            for name, peak in largest.items()
            if name in baseline
        }

    def _energy(
        self, last: DeviceReading | None
    ) -> tuple[float | None, Literal["energy counter", "power samples"] | None]:
        if self._first is not None and last is not None:
            before, after = self._first.energy_joules, last.energy_joules
            # The counter starts again at 0 when the driver is reloaded.
            if before is not None and after is not None and after >= before:
                return after - before, "energy counter"
        if self._power.num_samples > 1:
            return self._power.joules, "power samples"
        return None, None

    def _splits(
        self,
        allocator: AllocatorPeaks | None,
        largest: dict[str, int],
        last: dict[str, float],
    ) -> tuple[Reconciliation | None, Reconciliation | None]:
        if allocator is None:
            return None, None
        others = self._others_baseline()
        peak = _split(
            allocator.peak_allocated_bytes, allocator.peak_reserved_bytes, largest, others
        )
        end = _split(allocator.last.allocated_bytes, allocator.last.reserved_bytes, last, others)
        return peak, end

    def _unavailable(
        self, series: dict[str, SeriesStatistics], energy: float | None
    ) -> dict[str, str]:
        reasons: dict[str, str] = {}
        if self._device.unavailable is not None:
            reasons["nvml"] = self._device.unavailable
        else:
            for name in _DEVICE_COLUMNS:
                if name not in series:
                    reasons[name] = self._device.missing[name]
        if self._allocator.unavailable is not None:
            reasons["allocator"] = self._allocator.unavailable
        if energy is None:
            missing = self._device.missing
            reasons["energy_joules"] = self._device.unavailable or (
                f"energy counter: {missing.get('energy_joules', 'went backwards')}; "
                f"power: {missing.get('power_watts', 'fewer than two samples')}"
            )
        return reasons

    def _flags(self, process_source: str | None) -> tuple[str, ...]:
        flags: list[str] = []
        if process_source == "device delta" and self._reserved_before > 0:
            flags.append(
                "this process used the device before the monitor started and NVML does not list "
                "it, so its CUDA context counts as other processes' memory"
            )
        if self._device.unavailable is not None and self._first is not None:
            flags.append("NVML was lost during the run: its series end there")
        return tuple(flags)


def _phase_report(record: PhaseRecord, allocator: Mapping[str, int]) -> PhaseReport:
    return PhaseReport(
        num_times=record.num_times,
        seconds=record.seconds,
        rss_peak_bytes=record.maxima["rss_bytes"],
        device_used_peak_bytes=record.maxima.get("device_used_bytes"),
        process_used_peak_bytes=record.maxima.get("process_used_bytes"),
        allocated_peak_bytes=allocator.get("peak_allocated_bytes"),
        reserved_peak_bytes=allocator.get("peak_reserved_bytes"),
    )


def _split(
    allocated: int, reserved: int, used: Mapping[str, float], others: int | None
) -> Reconciliation | None:
    device, process = used.get("device_used_bytes"), used.get("process_used_bytes")
    if device is None and process is None:
        return None
    return reconcile(
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        process_used_bytes=None if process is None else int(process),
        device_used_bytes=None if device is None else int(device),
        others_baseline_bytes=others,
    )
