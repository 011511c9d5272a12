"""Times optimizer steps under a Trainer: from the end of one step to the end of the next.

That period holds everything the loop does for a step: data, collation, callbacks, forward,
backward, clipping, update, logging. The clock is a callback, the last in the row, so that the
callbacks of the Trainer that is timed fall into the period as well.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import memrt
from memrt.profiling.monitor import Monitor

__all__ = ["VARIANTS", "TrainerRun", "random_examples", "train"]

VARIANTS = ("transformers", "memrt", "memrt, monitored", "memrt, after memory_report")
"""Trainers that can be timed; the monitor samples and sees the edges of every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerRun:
    """The periods after the warm-up, and the loss that shows that the same was trained."""

    step_seconds: list[float]
    processor_seconds: list[float]
    """What each of these steps cost on all threads of the process: what else the machine does is
    not in it."""
    training_loss: float
    energy_joules: float | None = None
    """Of the whole run, with a monitor on a card that tells."""


class _Clock(transformers.TrainerCallback):
    def __init__(self, device: torch.device, wait: Callable[[], None] | None) -> None:
        self.num_steps = 0
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self._began: tuple[float, float] | None = None
        self._device = device
        self._wait = wait

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began[0])
            self.processor_seconds.append(time.process_time() - self._began[1])
        self.num_steps += 1
        if self._wait is not None:
            self._wait()
        self._began = time.perf_counter(), time.process_time()


class _Edges(transformers.TrainerCallback):
    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._monitor.begin_phase("step")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._monitor.end_phase("step")


def random_examples(
    vocabulary: int, *, count: int, length: int, seed: int
) -> list[dict[str, Tensor]]:
    """Rows of random ids, as a dataset."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)  # [count, length]
    return [{"input_ids": row, "labels": row} for row in ids]


def train(
    variant: str,
    model: nn.Module,
    examples: list[dict[str, Tensor]],
    *,
    device: torch.device,
    batch_size: int,
    steps: int,
    warm_up: int,
    arguments: Mapping[str, Any] | None = None,
    wait: Callable[[], None] | None = None,
) -> TrainerRun:
    """Train `steps` optimizer steps and time those after the first `warm_up`.

    `wait` is called between steps; how long it takes is in no period. The first step has none.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is unknown; use one of {', '.join(VARIANTS)}")
    if steps <= warm_up:
        raise ValueError(f"steps={steps}: must be more than warm_up={warm_up}")
    clock = _Clock(device, wait)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="memrt-benchmark-"))
        options = {
            "output_dir": folder,
            "per_device_train_batch_size": batch_size,
            "max_steps": steps,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "log_level": "error",
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": device.type == "cuda",
            **(arguments or {}),
        }
        callbacks: list[transformers.TrainerCallback] = [clock]
        monitor = None
        if variant == "memrt, monitored":
            monitor = stack.enter_context(Monitor(device=device))
            callbacks.insert(0, _Edges(monitor))
        trainer = _trainer(variant, model, examples, options, callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        loss = trainer.train().training_loss
        energy = None if monitor is None else monitor.stop().energy_joules
    assert clock.num_steps == steps, f"{clock.num_steps} steps ended, {steps} were asked for"
    first = max(0, warm_up - 1)
    return TrainerRun(
        step_seconds=clock.seconds[first:],
        processor_seconds=clock.processor_seconds[first:],
        training_loss=loss,
        energy_joules=energy,
    )


def _trainer(
    variant: str,
    model: nn.Module,
    examples: list[dict[str, Tensor]],
    options: dict[str, Any],
    callbacks: list[transformers.TrainerCallback],
) -> transformers.Trainer:
    trained = {"model": model, "train_dataset": examples, "callbacks": callbacks}
    if variant == "transformers":
        return transformers.Trainer(args=transformers.TrainingArguments(**options), **trained)
    counted = variant == "memrt, after memory_report"
    return memrt.Trainer(args=memrt.TrainingArguments(**options, memory_report=counted), **trained)
