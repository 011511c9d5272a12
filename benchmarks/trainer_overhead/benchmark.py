"""What memrt's Trainer costs when it has nothing to do.

Claim: without strategies `memrt.Trainer` is as fast as `transformers.Trainer`, also while the light
monitor (`memrt.profiling.monitor`) watches, and after `memory_report=True` has counted the first
three steps and left.

How it is measured: a small Llama is trained from the same weights on the same random ids by each
Trainer in turn, A B C D E, B C D E A, and so on, so that a machine that gets slower slows all of
them. A step lasts from the end of the one before to its own end, and is taken in processor time of
all threads of the process (the monitor's too), with torch on one thread, whose waiting would
otherwise be counted as work: wall time, which is recorded beside it, is the machine's as much as
ours. For each round, the median step of a variant is divided by that of transformers' Trainer; the
ratio is the median over the rounds. A second run of transformers' Trainer is one of the variants:
its ratio is the noise of the machine.

Goal: at most 1 % slower. Whether it is met is judged by the interval of a notched box plot around
the median, 1.57 × interquartile range / √rounds (McGill, Tukey and Larsen 1978): where it reaches
to both sides of the goal, the machine is too noisy to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from statistics import median
from typing import Any

import torch

import memrt
from benchmarks.record import spread
from benchmarks.shapes import llama_config
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
    "steps": 14,
    "warm_up": 4,
    "repetitions": 16,
    "seed": 0,
}
TINY: dict[str, Any] = {
    "size": "tiny",
    "batch_size": 2,
    "sequence_length": 16,
    "steps": 6,
    "repetitions": 2,
}


def _train_once(label: str, options: Mapping[str, Any]) -> TrainerRun:
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
    )


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds of every variant, in rotating order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _judged(_rounds(options))
    finally:
        torch.set_num_threads(threads)


def _rounds(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    repetitions: list[dict[str, Any]] = []
    for index in range(options["repetitions"]):
        turn = index % len(LABELS)
        runs = {label: _train_once(label, options) for label in LABELS[turn:] + LABELS[:turn]}
        repetitions.append(
            {
                label: {
                    "step_seconds": run.step_seconds,
                    "processor_seconds": run.processor_seconds,
                    "training_loss": run.training_loss,
                }
                for label, run in runs.items()
            }
        )
    return repetitions


def _judged(repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    walls, middles = (
        [{label: median(found[label][clock]) for label in LABELS} for found in repetitions]
        for clock in ("step_seconds", "processor_seconds")
    )
    ratios = {
        label: spread([found[label] / found[BASELINE] for found in middles])
        for label in LABELS
        if label != BASELINE
    }
    losses = {found[label]["training_loss"] for found in repetitions for label in LABELS}
    slowest = max(
        (label for label in ratios if label != CONTROL), key=lambda x: ratios[x]["median"]
    )
    noise = abs(ratios[CONTROL]["median"] - 1)
    return {
        "repetitions": repetitions,
        "summary": {
            "step_seconds": {label: spread([m[label] for m in walls]) for label in LABELS},
            "processor_seconds": {label: spread([m[label] for m in middles]) for label in LABELS},
            "ratio": ratios,
            "losses_equal": len(losses) == 1,
        },
        "met": _verdict(ratios) if len(losses) == 1 else False,
        "reason": f"{slowest}: {ratios[slowest]['median'] - 1:+.2%} a step, give or take "
        f"{_uncertainty(ratios[slowest]):.2%}; a second run of "
        f"transformers' Trainer: {noise:.2%} off itself"
        + ("" if len(losses) == 1 else "; the losses differ, so that not the same was trained"),
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
