"""What memrt's Trainer costs when it has nothing to do.

Claim: without strategies `memrt.Trainer` is as fast as `transformers.Trainer`, also while the light
monitor (`memrt.profiling.monitor`) watches, and after `memory_report=True` has counted the first
three steps and left.

How it is measured: a small Llama is trained from the same weights on the same random ids by each
Trainer, in processes that take turns, a step each (`turns`), so that a machine that gets slower
slows all of them. A step lasts from the end of the one before to its own end, less the waiting, and
is taken in processor time of all threads of its process (the monitor's too), with torch on one
thread, whose waiting would otherwise be counted as work: wall time, which is recorded beside it, is
the machine's as much as ours. For each round of steps, a variant's is divided by that of
transformers' Trainer; the ratio is the median over the rounds. A second run of transformers'
Trainer is one of the variants: its ratio is the noise of the machine.

Goal: at most 1 % slower. Whether it is met is judged by the interval of a notched box plot around
the median, 1.57 × interquartile range / √rounds (McGill, Tukey and Larsen 1978): where it reaches
to both sides of the goal, the machine is too noisy to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch

import memrt
from benchmarks.record import spread
from benchmarks.shapes import llama_config
from benchmarks.trainer_overhead.turns import Wait, train_in_turns
from benchmarks.trainer_steps import VARIANTS, TrainerRun, random_examples, train

__all__ = ["CLAIM", "DEFAULTS", "GOAL", "TINY", "run"]

CLAIM = "Without strategies memrt's Trainer is as fast as transformers' Trainer, monitored or not."
GOAL = "at most 1 % more processor time per step"
HIGHEST_RATIO = 1.01

BASELINE = "transformers"
CONTROL = "transformers, again"
LABELS = [*VARIANTS, CONTROL]

DEFAULTS: dict[str, Any] = {
    "size": "0.004B",
    "batch_size": 2,
    "sequence_length": 256,
    "steps": 300,
    "warm_up": 5,
    "seed": 0,
}
TINY: dict[str, Any] = {
    "size": "tiny",
    "batch_size": 2,
    "sequence_length": 16,
    "steps": 6,
    "warm_up": 3,
}


def _train_once(label: str, options: Mapping[str, Any], wait: Wait) -> TrainerRun:
    torch.set_num_threads(1)
    config = llama_config(options["size"])
    examples = random_examples(
        config.vocab_size,
        count=options["batch_size"] * options["steps"],
        length=options["sequence_length"],
        seed=options["seed"],
    )
    return train(
        BASELINE if label == CONTROL else label,
        memrt.load(config, dtype=torch.float32, seed=options["seed"]),
        examples,
        device=torch.device("cpu"),
        batch_size=options["batch_size"],
        steps=options["steps"],
        warm_up=options["warm_up"],
        wait=wait,
    )


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """One run of every variant, in turns; a repetition is one step of each."""
    return _judged(train_in_turns(LABELS, _train_once, options))


def _judged(runs: Mapping[str, TrainerRun]) -> dict[str, Any]:
    walls, costs = (
        {label: getattr(run, clock) for label, run in runs.items()}
        for clock in ("step_seconds", "processor_seconds")
    )
    baseline = costs[BASELINE]
    ratios = {
        label: spread([ours / theirs for ours, theirs in zip(cost, baseline, strict=True)])
        for label, cost in costs.items()
        if label != BASELINE
    }
    losses_equal = len({run.training_loss for run in runs.values()}) == 1
    slowest = max(
        (label for label in ratios if label != CONTROL), key=lambda x: ratios[x]["median"]
    )
    noise = abs(ratios[CONTROL]["median"] - 1)
    return {
        "repetitions": [
            {
                label: {"step_seconds": walls[label][index], "processor_seconds": cost[index]}
                for label, cost in costs.items()
            }
            for index in range(len(baseline))
        ],
        "summary": {
            "step_seconds": {label: spread(values) for label, values in walls.items()},
            "processor_seconds": {label: spread(values) for label, values in costs.items()},
            "ratio": ratios,
            "training_loss": {label: run.training_loss for label, run in runs.items()},
            "losses_equal": losses_equal,
        },
        "met": _verdict(ratios) if losses_equal else False,
        "reason": f"{slowest}: {ratios[slowest]['median'] - 1:+.2%} a step, give or take "
        f"{_uncertainty(ratios[slowest]):.2%}; a second run of "
        f"transformers' Trainer: {noise:.2%} off itself"
        + ("" if losses_equal else "; the losses differ, so that not the same was trained"),
    }


def _uncertainty(ratio: Mapping[str, float]) -> float:
    """Half the interval around a median within which another run's is to be expected."""
    width = ratio["upper_quartile"] - ratio["lower_quartile"]
    return float(1.57 * width / sqrt(ratio["count"]))


def _verdict(ratios: Mapping[str, Mapping[str, float]]) -> bool | None:
    """True, False, or None where noise reaches to both sides of the goal."""
    ours = [ratio for label, ratio in ratios.items() if label != CONTROL]
    if all(ratio["median"] + _uncertainty(ratio) <= HIGHEST_RATIO for ratio in ours):
        return True
    if any(ratio["median"] - _uncertainty(ratio) > HIGHEST_RATIO for ratio in ours):
        return False
    return None
