"""Plan, ledger, allocator and driver side by side, for models of 0.1B to 8B.

For each model and stack: the first two optimizer steps under the ledger, then steps at full speed,
by `memrt.measure`, the code of `memrt profile`. Beside it the light monitor reads torch's allocator
at every phase edge and NVML from a thread. cuBLAS workspaces are made before the first case and
stay, so `allocated_before_bytes` holds them, and the allocator's peak of a case is without them.
Where NVML does not list the process, the monitor sees what the device gains in a case;
`context_bytes` is what the process held before it beside the allocator's blocks, by the device's
growth since the process began.
What is compared:

    predicted_rounded_bytes   the plan's peak, every storage rounded up to 512 bytes
    counted                   the ledger's peak in the real run, and its accounts
    allocated                 max_memory_allocated, under the ledger and at full speed
    device                    what NVML lists for the process (or the device's growth), split into
                              lines that sum to it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.common import PartFile, Setting, empty, live_bytes, parse
from benchmarks.gpu.constants import Driver
from benchmarks.gpu.plans import key_of
from benchmarks.gpu.workloads import (
    Model,
    memory_models,
    stacks,
    strategies_of,
    workload,
)
from memrt.measure import LEDGER_STEPS, WARM_UP_STEPS, measure, num_tokens
from memrt.monitoring import PhaseMarks
from memrt.profiling.monitor import Monitor, MonitorReport

__all__ = [
    "allocator_peaks",
    "context_bytes",
    "driver_peaks",
    "main",
    "make_workspaces",
    "measured",
]

TIMED_STEPS = 5
CASE_SECONDS = 90.0
FULL_SPEED = ("forward", "backward", "step")


def measured(
    setting: Setting,
    model: Model,
    stack: str,
    *,
    steps: int,
    driver: Driver,
    on_built: Callable[[nn.Module], None] = lambda model: None,
) -> dict[str, Any]:
    """One run, with every number from every source."""
    empty(setting.device)
    before = live_bytes(setting.device) if setting.is_cuda else None
    context = context_bytes(setting, driver)
    work = workload(model, setting.device, steps=LEDGER_STEPS + WARM_UP_STEPS + steps)
    work = replace(work, build=partial(_built, work.build, on_built))
    pinned = _Pinned(setting)
    monitor = Monitor(device=setting.device)  # on the CPU it watches the host, and says why
    marks = PhaseMarks(monitor)
    with monitor:
        run = measure(work, strategies_of(stack), marks=marks)
    report = monitor.report()
    del run["timeline"], run["top_allocations"], run["owners"]
    conditions = run.pop("conditions")
    energy = _joules_per_token(report, marks, sum(map(num_tokens, work.windows[LEDGER_STEPS:])))
    return {
        **run,
        "size": model.size,
        "stack": stack,
        "num_parameters": conditions["num_parameters"],
        "tokens_per_step": model.shape.tokens_per_step,
        "allocated_before_bytes": before,
        "allocated": _allocated(report, before),
        "driver": {**driver_peaks(report), "context_bytes": context},
        "phase_seconds": {name: phase.seconds for name, phase in report.phases.items()},
        "pinned": pinned.read(),
        "joules_per_token": energy,
        "monitor_flags": list(report.flags),
        "unavailable": dict(report.unavailable),
    }


def _built(
    build: Callable[[Any], nn.Module], on_built: Callable[[nn.Module], None], strategies: Any
) -> nn.Module:
    model = build(strategies)
    on_built(model)
    return model


def context_bytes(setting: Setting, driver: Driver) -> int | None:
    """What the process holds beside the allocator's blocks."""
    own = driver.read()["own_bytes"]
    if own is None or not setting.is_cuda:
        return None
    return max(0, int(own) - int(torch.cuda.memory_reserved(setting.device)))


class _Pinned:
    """What torch's allocator of pinned host memory says, from now on."""

    def __init__(self, setting: Setting) -> None:
        self._statistics = getattr(torch.cuda, "host_memory_stats", None)
        if not setting.is_cuda:
            self._statistics = None
        if self._statistics is not None:
            torch.cuda.reset_peak_host_memory_stats()

    def read(self) -> dict[str, int] | None:
        """Bytes now and at most; None where nobody counts."""
        if self._statistics is None:
            return None
        return {
            name: int(value)
            for name, value in self._statistics().items()
            if "bytes" in name and name.endswith(("current", "peak"))
        }


def _joules_per_token(report: MonitorReport, marks: PhaseMarks, num: int) -> float | None:
    """Energy of the steps without the ledger, over their tokens."""
    before = marks.before_steps
    if report.energy_joules is None or before is None or before.energy_joules is None:
        return None
    return (report.energy_joules - before.energy_joules) / num


def allocator_peaks(report: MonitorReport) -> dict[str, int | None]:
    """max_memory_allocated of every phase."""
    return {name: phase.allocated_peak_bytes for name, phase in report.phases.items()}


def _allocated(report: MonitorReport, before: int | None) -> dict[str, Any] | None:
    """The allocator's peaks; None where there is no CUDA allocator."""
    if report.allocator is None or before is None:
        return None
    peaks = allocator_peaks(report)
    reserved = {name: phase.reserved_peak_bytes for name, phase in report.phases.items()}
    at_full_speed = max(peaks[name] or 0 for name in FULL_SPEED)
    return {
        "phases": peaks,
        "reserved_phases": reserved,
        "counted_peak_bytes": (peaks["counted"] or 0) - before,
        "full_speed_peak_bytes": at_full_speed - before,
        "peak_reserved_bytes": report.allocator.peak_reserved_bytes,
        "num_alloc_retries": report.allocator.num_alloc_retries,
    }


def driver_peaks(report: MonitorReport) -> dict[str, Any]:
    """NVML's peaks, and the lines that sum to them."""
    series = {
        name: values.to_json(as_integers=True)
        for name, values in report.series.items()
        if name.endswith("_bytes")
    }
    return {
        "source": report.source,
        "process_peak_bytes": report.process_peak_bytes,
        "process_source": report.process_source,
        "baseline": dict(report.baseline),
        "series": series,
        "at_peak": None if report.at_peak is None else report.at_peak.to_json(),
        "at_end": None if report.at_end is None else report.at_end.to_json(),
        "rss_peak_bytes": report.rss_peak_bytes,
    }


def make_workspaces(device: torch.device) -> None:
    """cuBLAS takes its workspaces at the first product, in forward's and in backward's thread."""
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(64, 64, device=device, dtype=dtype, requires_grad=True)
        (weight @ weight).sum().backward()


def _cases(setting: Setting) -> list[tuple[Model, str]]:
    return [
        (model, stack) for model in memory_models(setting) for stack in stacks(setting, model.size)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Fill memory.json; `--only 8B` for one model, so that each may have a process of its own."""
    setting = parse(argv, __doc__ or "")
    driver = Driver(setting)  # before the first tensor: its baseline is without our context
    part = PartFile(setting, "memory", case_seconds=CASE_SECONDS)
    make_workspaces(setting.device)
    steps = 1 if setting.tiny else TIMED_STEPS
    for model, stack in _cases(setting):
        part.case(
            key_of(model, stack),
            partial(measured, setting, model, stack, steps=steps, driver=driver),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
