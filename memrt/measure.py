"""One measured run: a few optimizer steps under the ledger, then the rest at full speed, timed.

The first `LEDGER_STEPS` steps belong to the run: they are the steps that `memrt.plan` trains on
fake tensors, by the same code (`memrt.runner`), so that their peak and accounts can be equal to the
byte. Then the ledger is dropped, one step warms up, and the steps after it are timed. The loss of
a run is the mean over its last `LOSS_STEPS` optimizer steps, on the training batches.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memrt.gpus import Gpu
from memrt.profiling.accounts import Place
from memrt.profiling.ledger import Ledger
from memrt.profiling.report import SCHEMA, conditions, timeline_json
from memrt.runner import Batch, Run, copied, model_loss, start, train_step

if TYPE_CHECKING:
    from memrt.monitoring import PhaseMarks
    from memrt.profiling.timeline import Record, Timeline
    from memrt.strategy import Strategy
    from memrt.structure import RunSettings

__all__ = [
    "LEDGER_STEPS",
    "LOSS_STEPS",
    "MIN_STEPS",
    "WARM_UP_STEPS",
    "Workload",
    "measure",
    "measured_peaks",
]

LEDGER_STEPS = 2
"""The first makes the optimizer's state, the second is the steady state; as in a plan."""
WARM_UP_STEPS = 1
MIN_STEPS = LEDGER_STEPS + WARM_UP_STEPS + 1
LOSS_STEPS = 3

_ALLOCATION_BYTES = 512  # the CUDA caching allocator's rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a run trains; every run of a comparison is given the same."""

    build: Callable[[Sequence[Strategy]], nn.Module]
    """The model on `device`, loaded through the strategies."""
    windows: Sequence[Sequence[Batch]]
    """Micro-batches of every optimizer step, in order, on the CPU."""
    settings: RunSettings
    device: torch.device
    evaluation: Sequence[Batch] = ()
    description: Mapping[str, Any] = field(default_factory=dict)
    """What goes into the report's conditions."""

    def __post_init__(self) -> None:
        if len(self.windows) < MIN_STEPS:
            raise ValueError(
                f"steps={len(self.windows)}: must be {MIN_STEPS} or more "
                f"({LEDGER_STEPS} under the ledger, {WARM_UP_STEPS} to warm up, the rest timed)"
            )

    def fresh_model(self, strategies: Sequence[Strategy]) -> nn.Module:
        """What `build` returns, when the model and optimizer of a run before are gone.

        Sessions and strategies refer to each other, which no reference count ends.
        """
        gc.collect()
        return self.build(strategies)


def measure(
    workload: Workload,
    strategies: Sequence[Strategy],
    *,
    marks: PhaseMarks | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train `workload` under `strategies` and return the run in the report's schema."""
    torch.manual_seed(workload.settings.seed)
    with _memory_errors(workload.device):
        with _phase(marks, "load"):
            model = workload.fresh_model(strategies)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        torch.manual_seed(workload.settings.seed)  # dropout: equal whatever the build has drawn
        with _phase(marks, "counted"):
            run, timeline = _counted_steps(workload, model, strategies, on_step)
        memory = _memory(timeline)
        if marks is not None:
            marks.begin_steps(run)
        seconds = _timed_steps(workload, run, marks, on_step)
        evaluation_loss = _evaluate(run, workload.evaluation)
    timed = workload.windows[LEDGER_STEPS + WARM_UP_STEPS :]
    result = {
        "schema": SCHEMA,
        "kind": "run",
        **memory,
        "tokens_per_second": sum(map(num_tokens, timed)) / sum(seconds[WARM_UP_STEPS:]),
        "step_seconds": seconds[WARM_UP_STEPS:],
        "loss": fmean(run.losses[-LOSS_STEPS:]),
        "losses": run.losses,
        **_finite(gradient_norms=run.gradient_norms, evaluation_loss=evaluation_loss),
        "conditions": conditions(
            settings={**workload.description, "num_parameters": num_parameters},
            strategies=[str(strategy) for strategy in strategies],
            device=str(workload.device),
        ),
    }
    run.session.detach()
    return result


def measured_peaks(workload: Workload, strategies: Sequence[Strategy]) -> dict[str, int | None]:
    """Train the steps of the ledger: `counted`, its peak, and `allocated`, the allocator's.

    The allocator is asked about one more step, without the ledger; None where there is no CUDA.
    """
    torch.manual_seed(workload.settings.seed)
    with _memory_errors(workload.device):
        model = workload.fresh_model(strategies)
        torch.manual_seed(workload.settings.seed)
        run, timeline = _counted_steps(workload, model, strategies, lambda: None)
        allocated = None
        if workload.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(workload.device)
            train_step(run, copied(workload.windows[LEDGER_STEPS], workload.device))
            allocated = torch.cuda.max_memory_allocated(workload.device)
    run.session.detach()
    return {"counted": timeline.peak().peak_bytes, "allocated": allocated}


def num_tokens(window: Sequence[Batch]) -> int:
    """Tokens of one optimizer step, padding not counted."""
    return sum(
        int(batch["attention_mask"].sum())
        if "attention_mask" in batch
        else batch["input_ids"].numel()
        for batch in window
    )


def _counted_steps(
    workload: Workload,
    model: nn.Module,
    strategies: Sequence[Strategy],
    on_step: Callable[[], None],
) -> tuple[Run, Timeline]:
    ledger = Ledger(device_type=workload.device.type)
    # copied before the ledger looks, and dropped step by step, as a data loader's batches are
    windows = [copied(window, workload.device) for window in workload.windows[:LEDGER_STEPS]]
    (probe,) = copied(workload.windows[0][:1], workload.device)
    with ledger:
        run = start(model, strategies, settings=workload.settings, ledger=ledger, probe=probe)
        while windows:
            train_step(run, windows.pop(0))
            on_step()
    run.session.drop_ledger()
    return run, ledger.timeline


def _timed_steps(
    workload: Workload, run: Run, marks: PhaseMarks | None, on_step: Callable[[], None]
) -> list[float]:
    seconds = []
    for window in workload.windows[LEDGER_STEPS:]:
        _synchronize(workload.device)
        began = time.perf_counter()
        train_step(run, copied(window, workload.device))
        if marks is not None:
            marks.end_step()
        _synchronize(workload.device)
        seconds.append(time.perf_counter() - began)
        on_step()
    return seconds


def _evaluate(run: Run, batches: Sequence[Batch]) -> float | None:
    """Mean loss over held-out batches; None without any."""
    if not batches:
        return None
    model = run.session.model
    model.eval()
    with torch.no_grad():
        losses = [float(model_loss(model, batch)) for batch in copied(batches, run.session.device)]
    model.train()
    return fmean(losses)


def _finite(*, gradient_norms: list[float], evaluation_loss: float | None) -> dict[str, Any]:
    """What nothing stops from being NaN after the last step, as JSON takes it: None."""
    norms = [norm if math.isfinite(norm) else None for norm in gradient_norms]
    loss = evaluation_loss
    if loss is not None and not math.isfinite(loss):
        loss = None
    return {
        "gradient_norms": norms,
        "evaluation_loss": loss,
        "not_finite": [
            *(["gradient_norms"] if None in norms else []),
            *(["evaluation_loss"] if loss is not evaluation_loss else []),
        ],
    }


def _memory(timeline: Timeline) -> dict[str, Any]:
    """The ledger's part of the report."""

    def rounded(record: Record) -> int:
        return -(-record.num_bytes // _ALLOCATION_BYTES) * _ALLOCATION_BYTES

    rounded_peak_bytes = max(
        live for _, live, _ in timeline.live_bytes(place=Place.DEVICE, size=rounded)
    )
    return {
        **timeline_json(timeline),
        "rounded_peak_bytes": rounded_peak_bytes,
        "device_bytes": Gpu.required_bytes(rounded_peak_bytes),
    }


def _phase(marks: PhaseMarks | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if marks is None else marks.phase(name)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    """Turn torch's out-of-memory errors into Python's, with a remedy."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text):
            raise
        raise MemoryError(
            f"out of memory on {device}: {text} Lower --batch or --seq, or add strategies; "
            "`memrt plan` tells beforehand what a run needs"
        ) from error
    finally:
        gc.collect()  # autograd graphs of a failed step hold each other
