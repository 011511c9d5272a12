"""What memrt's Trainer costs when it has nothing to do.

Claim: without strategies `memrt.Trainer` is as fast as `transformers.Trainer`, also while the light
monitor (`memrt.profiling.monitor`) watches, and after `memory_report=True` has counted the first
three steps and left.

How it is measured: a Llama is trained from the same weights on the same random ids by each Trainer,
in processes that take turns, a step each (`turns`), so that a machine that gets slower slows all of
them. A step lasts from the end of the one before to its own end, less the waiting, and is taken in
processor time of all threads of its process (the monitor's too), with torch on one thread, whose
waiting would otherwise be counted as work. A second run of transformers' Trainer is one of the
variants: what it is off itself is the noise of the machine.

That noise is about 1 % of a step (a process is faster or slower all along, by where its memory
lies), as much as the goal. So what a Trainer adds is measured on a narrow model of seven layers,
whose step is short: per step, its processor time less that of transformers' Trainer in the same
round; the median over the rounds. It is then put beside a step of a model of 0.004B parameters and
fewer layers, of one fifth of a second, which is small for what anybody trains. The ratio of whole
steps of that model is kept beside it: there, what grows with the model would show.

Goal: what is added is at most 1 % of the step. Whether it is met is judged by the interval of a
notched box plot around the median, 1.57 × interquartile range / √rounds (McGill, Tukey and Larsen
1978): where it reaches to both sides of the goal, the machine is too noisy to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from statistics import median
from typing import Any

import torch

import memrt
from benchmarks.record import spread
from benchmarks.shapes import llama_config
from benchmarks.trainer_overhead.turns import Wait, train_in_turns
from benchmarks.trainer_steps import VARIANTS, TrainerRun, random_examples, train

__all__ = ["CLAIM", "DEFAULTS", "GOAL", "TINY", "run"]

CLAIM = "Without strategies memrt's Trainer is as fast as transformers' Trainer, monitored or not."
GOAL = "adds at most 1 % to the processor time of a step"
HIGHEST_SHARE = 0.01

BASELINE = "transformers"
CONTROL = "transformers, again"
LABELS = [*VARIANTS, CONTROL]

DEFAULTS: dict[str, Any] = {
    "narrow_size": "tiny",
    "narrow_sequence_length": 16,
    "narrow_steps": 600,
    "size": "0.004B",
    "sequence_length": 256,
    "steps": 60,
    "batch_size": 2,
    "warm_up": 5,
    "seed": 0,
}
TINY: dict[str, Any] = {"narrow_steps": 7, "size": "tiny", "sequence_length": 32, "steps": 7}


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
    """Two runs of every variant, in turns: on the narrow model and on the other."""
    narrow = {
        **options,
        "size": options["narrow_size"],
        "sequence_length": options["narrow_sequence_length"],
        "steps": options["narrow_steps"],
    }
    return _judged(
        narrow=train_in_turns(LABELS, _train_once, narrow),
        whole=train_in_turns(LABELS, _train_once, options),
    )


def _judged(*, narrow: Mapping[str, TrainerRun], whole: Mapping[str, TrainerRun]) -> dict[str, Any]:
    step_seconds = median(whole[BASELINE].processor_seconds)
    added = _each(narrow, lambda ours, theirs: (ours - theirs) / step_seconds)
    losses_equal = all(
        len({run.training_loss for run in runs.values()}) == 1 for runs in (narrow, whole)
    )
    most = max((label for label in added if label != CONTROL), key=lambda x: added[x]["median"])
    return {
        "repetitions": [
            {"model": name, "step_seconds": _times(runs, "step_seconds")}
            | {"processor_seconds": _times(runs, "processor_seconds")}
            for name, runs in (("narrow", narrow), ("whole", whole))
        ],
        "summary": {
            "added_share_of_step": added,
            "whole_step_ratio": _each(whole, lambda ours, theirs: ours / theirs),
            "narrow_processor_seconds": _spreads(narrow),
            "processor_seconds": _spreads(whole),
            "losses_equal": losses_equal,
        },
        "met": _verdict(added) if losses_equal else False,
        "reason": f"{most} adds {added[most]['median'] * step_seconds * 1e3:.2f} ms to a step, "
        f"{added[most]['median']:.2%} of {step_seconds * 1e3:.0f} ms, give or take "
        f"{_uncertainty(added[most]):.2%}; a second run of transformers' Trainer: "
        f"{added[CONTROL]['median']:+.2%}"
        + ("" if losses_equal else "; the losses differ, so that not the same was trained"),
    }


def _each(
    runs: Mapping[str, TrainerRun], compare: Callable[[float, float], float]
) -> dict[str, dict[str, float]]:
    """Every variant against the baseline, round by round."""
    baseline = runs[BASELINE].processor_seconds
    return {
        label: spread(
            [compare(*both) for both in zip(run.processor_seconds, baseline, strict=True)]
        )
        for label, run in runs.items()
        if label != BASELINE
    }


def _times(runs: Mapping[str, TrainerRun], clock: str) -> dict[str, list[float]]:
    return {label: getattr(run, clock) for label, run in runs.items()}


def _spreads(runs: Mapping[str, TrainerRun]) -> dict[str, dict[str, float]]:
    return {label: spread(run.processor_seconds) for label, run in runs.items()}


def _uncertainty(found: Mapping[str, float]) -> float:
    """Half the interval around a median within which another run's is to be expected."""
    width = found["upper_quartile"] - found["lower_quartile"]
    return float(1.57 * width / sqrt(found["count"]))


def _verdict(added: Mapping[str, Mapping[str, float]]) -> bool | None:
    """True, False, or None where noise reaches to both sides of the goal."""
    ours = [share for label, share in added.items() if label != CONTROL]
    if all(share["median"] + _uncertainty(share) <= HIGHEST_SHARE for share in ours):
        return True
    if any(share["median"] - _uncertainty(share) > HIGHEST_SHARE for share in ours):
        return False
    return None
