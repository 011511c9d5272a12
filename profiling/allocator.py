"""PyTorch's CUDA allocator: its counters, peaks per phase, and how they add up to nvidia-smi.

The allocator's peak counters miss nothing, where a sampling thread misses what rises and falls
between two samples. ``AllocatorPhases`` reads them at every phase edge and resets them, so each
phase has a peak of its own. Resetting them takes ``torch.cuda.max_memory_allocated()`` away from
others in the process, and another's reset hides a peak from us.

What nvidia-smi shows is split, all in bytes, into lines that sum to it::

    process = allocated + (reserved - allocated) + (process - reserved)
              tensors     cached and fragmented    context, cuBLAS, NCCL: not the allocator's
    device  = process + (device - process)
                        other processes and the driver

No line is ever negative. Two sources read at different instants can contradict each other (the
allocator holding more than the driver counts); then the line is 0, the lines sum to the larger
number, and ``flags`` and ``shortfall_bytes`` say so.

Costs nothing between edges; an edge reads one table of counters and resets the peaks in it.

Source: docs.pytorch.org/docs/stable/notes/cuda.html, "Memory management".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch

from memrt.profiling.phase_peaks import PhasePeaks

__all__ = [
    "AllocatorPeaks",
    "AllocatorPhases",
    "AllocatorReading",
    "AllocatorSource",
    "AllocatorUnavailable",
    "CudaAllocator",
    "Reconciliation",
    "reconcile",
]


class AllocatorUnavailable(RuntimeError):  # noqa: N818 - says a state, not a fault of the caller
    """There is no CUDA allocator to read; ``reason`` says why in one clause."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the CUDA allocator is not available: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorReading:
    """The allocator's counters at one instant; peaks count from the last reset."""

    allocated_bytes: int  # tensors, each rounded up to 512 bytes
    requested_bytes: int  # tensors before rounding
    active_bytes: int  # allocated, and freed but still awaited by another stream
    reserved_bytes: int  # taken from the driver
    inactive_split_bytes: int  # free pieces of blocks that are partly in use: fragmentation
    peak_allocated_bytes: int
    peak_active_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int  # times that the cache was emptied to satisfy a request
    num_ooms: int


class AllocatorSource(Protocol):
    """What ``AllocatorPhases`` reads."""

    def read(self) -> AllocatorReading:
        """The counters now."""

    def reset_peaks(self) -> None:
        """Lets every peak start again from the current value."""


class CudaAllocator:
    """PyTorch's own counters for one CUDA device."""

    def __init__(self, device: torch.device | int | None = None) -> None:
        if not torch.cuda.is_available():
            built = torch.version.cuda is not None
            raise AllocatorUnavailable(
                "torch sees no CUDA device" if built else "this torch is built without CUDA"
            )
        self.device = _device_index(device)

    def read(self) -> AllocatorReading:
        # The nested form is one C call; memory_stats() flattens it in Python first.
        statistics = torch.cuda.memory_stats_as_nested_dict(self.device)

        def value(name: str, kind: str) -> int:
            # Empty before CUDA is initialised, when nothing has been allocated.
            return int(statistics[name]["all"][kind]) if statistics else 0

        return AllocatorReading(
            allocated_bytes=value("allocated_bytes", "current"),
            requested_bytes=value("requested_bytes", "current"),
            active_bytes=value("active_bytes", "current"),
            reserved_bytes=value("reserved_bytes", "current"),
            inactive_split_bytes=value("inactive_split_bytes", "current"),
            peak_allocated_bytes=value("allocated_bytes", "peak"),
            peak_active_bytes=value("active_bytes", "peak"),
            peak_reserved_bytes=value("reserved_bytes", "peak"),
            num_alloc_retries=int(statistics.get("num_alloc_retries", 0)),
            num_ooms=int(statistics.get("num_ooms", 0)),
        )

    def reset_peaks(self) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorPeaks:
    """The largest values of a run and of its phases, and the reading at its end."""

    peak_allocated_bytes: int
    peak_active_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int
    num_ooms: int
    last: AllocatorReading
    phases: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class AllocatorPhases:
    """Allocator peaks per phase, and the run's, from counters read and reset at phase edges.

    ``source`` None is the form without CUDA: phases may be named all the same, ``peaks`` gives None
    and ``unavailable`` says why.
    """

    def __init__(self, source: AllocatorSource | None, *, unavailable: str | None = None) -> None:
        if (source is None) == (unavailable is None):
            raise ValueError(
                f"source={source!r} and unavailable={unavailable!r}: give a source, or None and "
                "the reason why there is none"
            )
        self._source = source
        self.unavailable = unavailable
        self._peaks = PhasePeaks()
        self._retries_before = self._ooms_before = 0
        if source is not None:
            first = source.read()
            self._retries_before, self._ooms_before = first.num_alloc_retries, first.num_ooms
            source.reset_peaks()

    @classmethod
    def for_device(cls, device: torch.device | int | None = None) -> AllocatorPhases:
        """For torch's CUDA device, or the form that says why there is none."""
        try:
            return cls(CudaAllocator(device))
        except AllocatorUnavailable as error:
            return cls(None, unavailable=error.reason)

    def begin(self, name: str) -> None:
        self.edge()
        self._peaks.begin(name)

    def end(self, name: str) -> None:
        self.edge()
        self._peaks.end(name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase around a block; phases nest, and an outer one holds the peaks of the inner."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def edge(self) -> AllocatorReading | None:
        """Books the peaks since the last edge to the open phases and starts them anew."""
        if self._source is None:
            return None
        reading = self._source.read()
        self._source.reset_peaks()
        self._peaks.fold(
            {
                "peak_allocated_bytes": reading.peak_allocated_bytes,
                "peak_active_bytes": reading.peak_active_bytes,
                "peak_reserved_bytes": reading.peak_reserved_bytes,
            }
        )
        return reading

    def maxima(self) -> dict[str, int] | None:
        """The largest values up to now and the bytes that are reserved, in one reading."""
        last = self.edge()
        if last is None:
            return None
        return {**self._peaks.overall.maxima, "reserved_bytes": last.reserved_bytes}

    def peaks(self) -> AllocatorPeaks | None:
        """The peaks up to now, this instant included; None where ``unavailable``."""
        last = self.edge()
        if last is None:
            return None
        largest = self._peaks.overall.maxima
        return AllocatorPeaks(
            peak_allocated_bytes=largest["peak_allocated_bytes"],
            peak_active_bytes=largest["peak_active_bytes"],
            peak_reserved_bytes=largest["peak_reserved_bytes"],
            num_alloc_retries=max(0, last.num_alloc_retries - self._retries_before),
            num_ooms=max(0, last.num_ooms - self._ooms_before),
            last=last,
            phases={name: dict(record.maxima) for name, record in self._peaks.phases.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """What nvidia-smi shows, as lines that sum to it; None for a line that nobody can know.

    ``shortfall_bytes`` is how much larger the sum is than the driver's number: 0 unless the
    readings contradict each other, which ``flags`` then says.
    """

    scope: Literal["process", "device"]
    nvml_bytes: int
    allocated_bytes: int
    cached_bytes: int
    context_and_other_bytes: int
    other_processes_bytes: int | None
    shortfall_bytes: int = 0
    flags: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """The sum of the lines: ``nvml_bytes + shortfall_bytes``."""
        return sum(self.lines().values())

    def lines(self) -> dict[str, int]:
        """Label and bytes of each line, in the order of a table."""
        context = "context and other"
        if self.scope == "device" and self.other_processes_bytes is None:
            context = "context, other and other processes"
        lines = {
            "allocated": self.allocated_bytes,
            "cached and fragmented": self.cached_bytes,
            context: self.context_and_other_bytes,
        }
        if self.other_processes_bytes is not None:
            lines["other processes and driver"] = self.other_processes_bytes
        return lines

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes, "flags": list(self.flags)}


def reconcile(
    *,
    allocated_bytes: int,
    reserved_bytes: int,
    process_used_bytes: int | None = None,
    device_used_bytes: int | None = None,
    others_baseline_bytes: int | None = None,
) -> Reconciliation:
    """Splits the device's used bytes, or the process's where the device's are not known.

    ``others_baseline_bytes`` is what the device held beside this process before the run; it stands
    in for the other processes where this process's own share is not known (containers).
    """
    if process_used_bytes is None and device_used_bytes is None:
        raise ValueError(
            "process_used_bytes and device_used_bytes are both None; reconcile() needs one of "
            "them from NVML"
        )
    flags: list[str] = []
    reserved = max(reserved_bytes, allocated_bytes)
    if reserved_bytes < allocated_bytes:
        flags.append("stale: the allocator's reserved bytes are below its allocated bytes")
    shown = device_used_bytes if device_used_bytes is not None else process_used_bytes
    assert shown is not None
    own = process_used_bytes
    others: int | None = None
    if own is None and others_baseline_bytes is not None:
        own = shown - others_baseline_bytes
        if own < reserved <= shown:
            flags.append("stale: other processes have freed memory since the baseline")
            own = reserved
    if own is not None and device_used_bytes is not None:
        others = max(0, device_used_bytes - max(own, reserved))
        if device_used_bytes < own:
            flags.append("stale: the device's used bytes are below this process's")
    elif own is None:
        own = shown
    if own < reserved:
        flags.append("stale: NVML's used bytes are below the allocator's reserved bytes")
    context = max(0, own - reserved)
    total = reserved + context + (others or 0)
    return Reconciliation(
        scope="process" if device_used_bytes is None else "device",
        nvml_bytes=shown,
        allocated_bytes=allocated_bytes,
        cached_bytes=reserved - allocated_bytes,
        context_and_other_bytes=context,
        other_processes_bytes=others,
        shortfall_bytes=total - shown,
        flags=tuple(flags),
    )


def _device_index(device: torch.device | int | None) -> int:
    if isinstance(device, int):
        return device
    if device is not None and device.type != "cuda":
        raise ValueError(f"device={device}: the CUDA allocator has no such device; give a cuda one")
    if device is None or device.index is None:
        return torch.cuda.current_device()
    return device.index
