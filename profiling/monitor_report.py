"""What a monitored run hands back: statistics of every series, peaks, energy, and what is missing.

Bytes are integers in JSON; a number that could not be had is absent or None, with its reason in
``unavailable``. A peak delta is the peak minus the baseline, and 0 where the peak stayed below: the
memory of a process that shrinks has grown by nothing, not by a negative amount.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from memrt.profiling.allocator import AllocatorPeaks, Reconciliation

__all__ = ["MonitorReport", "PhaseReport", "RunningStatistics", "SeriesStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesStatistics:
    """One sampled series in four numbers; the mean is over samples."""

    mean: float
    min: float
    max: float
    last: float
    num_samples: int

    def to_json(self, *, as_integers: bool) -> dict[str, float]:
        """JSON form; ``as_integers`` for bytes, whose mean is rounded."""
        values = asdict(self)
        return {name: round(value) for name, value in values.items()} if as_integers else values


class RunningStatistics:
    """Builds ``SeriesStatistics`` one sample at a time, so that a long run takes no more memory."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._num_samples = 0
        self._min = self._max = self._last = 0.0

    def add(self, value: float) -> None:
        first = self._num_samples == 0
        self._num_samples += 1
        self._sum += value
        self._min = value if first else min(self._min, value)
        self._max = value if first else max(self._max, value)
        self._last = value

    def totals(self) -> tuple[float, int]:
        """The sum of the samples and their number, so that a later mean can be of new ones."""
        return self._sum, self._num_samples

    def result(self) -> SeriesStatistics:
        assert self._num_samples > 0, "a series exists from its first sample on"
        return SeriesStatistics(
            mean=self._sum / self._num_samples,
            min=self._min,
            max=self._max,
            last=self._last,
            num_samples=self._num_samples,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseReport:
    """One phase over the run. None: no sample fell into it, or the source is not available."""

    num_times: int
    seconds: float
    rss_peak_bytes: int
    device_used_peak_bytes: int | None
    process_used_peak_bytes: int | None
    allocated_peak_bytes: int | None
    reserved_peak_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorReport:
    """A monitored run.

    ``process_source`` says how ``process_peak_bytes`` (device memory of this process) was had:
    ``listed`` by NVML, or ``device delta``: what the device gained since the baseline, which takes
    other processes' growth along. ``at_peak`` splits the largest readings of the run, each at its
    own instant; ``at_end`` one instant.
    """

    source: Literal["nvml", "rss"]
    duration_seconds: float
    interval_seconds: float
    num_samples: int
    sampler_cpu_seconds: float
    process_cpu_seconds: float
    series: Mapping[str, SeriesStatistics]
    baseline: Mapping[str, int]
    rss_peak_bytes: int
    process_peak_bytes: int | None
    process_source: Literal["listed", "device delta"] | None
    peak_delta_bytes: Mapping[str, int]
    phases: Mapping[str, PhaseReport]
    energy_joules: float | None
    energy_source: Literal["energy counter", "power samples"] | None
    allocator: AllocatorPeaks | None
    at_peak: Reconciliation | None
    at_end: Reconciliation | None
    device_name: str | None = None
    driver_version: str | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    failure: str | None = None

    def joules_per_token(self, num_tokens: int) -> float | None:
        """Energy for one token of the run; None where ``unavailable["energy_joules"]`` says why."""
        if num_tokens <= 0:
            raise ValueError(f"num_tokens={num_tokens} is not positive; give the run's token count")
        return None if self.energy_joules is None else self.energy_joules / num_tokens

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        plain: dict[str, Any] = {
            name: getattr(self, name)
            for name in self.__slots__
            if name not in {"series", "phases", "allocator", "at_peak", "at_end", "flags"}
        }
        for name in ("baseline", "peak_delta_bytes", "unavailable"):
            plain[name] = dict(plain[name])
        plain["flags"] = list(self.flags)
        plain["series"] = {
            name: values.to_json(as_integers=name.endswith("_bytes"))
            for name, values in self.series.items()
        }
        plain["phases"] = {name: asdict(phase) for name, phase in self.phases.items()}
        for name, part in (
            ("allocator", self.allocator),
            ("at_peak", self.at_peak),
            ("at_end", self.at_end),
        ):
            plain[name] = None if part is None else part.to_json()
        return plain
