"""Tokens a second and energy of every stack, beside a plain loop and transformers' Trainer.

One model, batches that keep a large card busy. Everything is measured in the same process and in
turns: in each of two rounds every variant trains from the same weights for a few steps, the device
waited for at the end of each step. The variants:

    torch loop            forward, backward, clipping, torch.optim.AdamW(fused=True)
    transformers.Trainer  the same optimizer under its loop
    memrt.Trainer         without strategies
    stacks                the session that `memrt.prepare` gives, as `memrt profile` drives it

Energy is what the card's counter says (or power over time) of a variant's timed steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import memrt
from benchmarks.gpu.common import PartFile, Setting, empty, parse, synchronize
from benchmarks.gpu.workloads import (
    DTYPE,
    SETTINGS,
    Model,
    speed_model,
    stacks,
    strategies_of,
    workload,
)
from benchmarks.shapes import llama_config
from benchmarks.trainer_steps import random_examples, train
from memrt.measure import Workload
from memrt.profiling.monitor import Monitor
from memrt.runner import Batch, model_loss, start, train_step

__all__ = ["main"]

LOOP = "torch loop"
TRAINERS = {"transformers.Trainer": "transformers", "memrt.Trainer": "memrt"}
LEFT_OUT = ("offload_activations", "activation_checkpoint", "lisa+int8_states")
"""The first moves tens of GB a step without checkpointing; others like the last two are here.
`memory` has their speed at a smaller batch."""

ROUNDS = 2
WARM_UP = 3
TIMED = 8

Step = Callable[[Sequence[Batch]], None]


def _plain_step(model: nn.Module) -> Step:
    """The loop that people write."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=SETTINGS.learning_rate, weight_decay=0.0, fused=True
    )

    def step(window: Sequence[Batch]) -> None:
        for batch in window:
            (model_loss(model, batch) / len(window)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _stack_step(model: nn.Module, stack: str) -> Step:
    run = start(model, strategies_of(stack), settings=SETTINGS)
    return lambda window: train_step(run, window)


def _timed(setting: Setting, work: Workload, step: Step) -> dict[str, Any]:
    """Warm up, then time every step; energy is of the timed steps."""
    seconds = []
    before = None
    with Monitor(device=setting.device) as monitor:
        for index, window in enumerate(work.windows):
            if index == WARM_UP:
                before = monitor.report().energy_joules
            synchronize(setting.device)
            began = time.perf_counter()
            step(window)
            synchronize(setting.device)
            seconds.append(time.perf_counter() - began)
    report = monitor.report()
    after, allocator = report.energy_joules, report.allocator
    return {
        "step_seconds": seconds[WARM_UP:],
        "energy_joules": None if before is None or after is None else after - before,
        "peak_allocated_bytes": None if allocator is None else allocator.peak_allocated_bytes,
    }


def _loop(setting: Setting, model: Model, variant: str) -> dict[str, Any]:
    timed = 2 if setting.tiny else TIMED
    work = workload(model, setting.device, steps=WARM_UP + timed)
    strategies = [] if variant == LOOP else strategies_of(variant)
    built = work.build(strategies)
    built.config.use_cache = False
    built.train()
    if variant == LOOP:
        return _timed(setting, work, _plain_step(built))
    return _timed(setting, work, _stack_step(built, variant))


def _trainer(setting: Setting, model: Model, variant: str) -> dict[str, Any]:
    config = llama_config(model.size)
    steps = WARM_UP + (2 if setting.tiny else TIMED)
    examples = random_examples(
        config.vocab_size,
        count=model.shape.batch_size * steps,
        length=model.shape.sequence_length,
        seed=0,
    )
    if setting.is_cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    run = train(
        TRAINERS[variant],
        memrt.load(config, dtype=DTYPE, device=setting.device, seed=0),
        examples,
        device=setting.device,
        batch_size=model.shape.batch_size,
        steps=steps,
        warm_up=WARM_UP,
        arguments={"weight_decay": 0.0, "max_grad_norm": SETTINGS.max_grad_norm},
    )
    peak = torch.cuda.max_memory_allocated(setting.device) if setting.is_cuda else None
    return {
        "step_seconds": run.step_seconds,
        "energy_joules": None,
        "peak_allocated_bytes": peak,
    }


def _row(setting: Setting, model: Model, variant: str) -> dict[str, Any]:
    empty(setting.device)
    found = (_trainer if variant in TRAINERS else _loop)(setting, model, variant)
    seconds, energy = found["step_seconds"], found["energy_joules"]
    tokens = model.shape.tokens_per_step
    return {
        **found,
        "variant": variant,
        "tokens_per_second": tokens / median(seconds),
        "joules_per_token": None if energy is None else energy / (tokens * len(seconds)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Fill speed.json."""
    setting = parse(argv, __doc__ or "")
    part = PartFile(setting, "speed")
    model = speed_model(setting)
    shape = {"batch_size": model.shape.batch_size, "sequence_length": model.shape.sequence_length}
    part.add("workload", {"size": model.size, "dtype": str(DTYPE), **shape})
    tried = [stack for stack in stacks(setting, model.size) if stack not in LEFT_OUT]
    variants = [LOOP, *TRAINERS, *tried]
    for index in range(1 if setting.tiny else ROUNDS):
        for variant in variants:
            part.case(f"{variant}, round {index + 1}", partial(_row, setting, model, variant))
    return 0


if __name__ == "__main__":
    sys.exit(main())
