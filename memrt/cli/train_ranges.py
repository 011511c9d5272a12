"""Which numbers a setting can have, told before anything is read and in the user's own words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers.training_args import trainer_log_levels

from memrt.arguments import RANGES
from memrt.gpus import Gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["require_ranges"]

_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "training.max_steps": (
        lambda steps: steps == -1 or steps >= 1,
        "must be at least 1, or -1 for as many as training.num_train_epochs are",
    ),
    "training.num_train_epochs": (lambda epochs: 0 < epochs < math.inf, "must be above 0"),
    **{f"training.{name}": rule for name, rule in RANGES.items()},
    "training.warmup_steps": (lambda steps: 0 <= steps < math.inf, "must be a number from 0"),
    "training.label_smoothing_factor": (
        lambda factor: 0 <= factor < 1,
        "must be a number from 0 and below 1",
    ),
    "training.neftune_noise_alpha": (
        lambda alpha: 0 <= alpha < math.inf,
        "must be a number from 0",
    ),
    "training.dataloader_num_workers": (lambda workers: workers >= 0, "must be at least 0"),
    "training.log_level": (
        lambda level: level in trainer_log_levels,
        f"must be one of {', '.join(trainer_log_levels)}",
    ),
    "training.data_seed": (lambda seed: 0 <= seed < 2**32, "must be from 0 to 4294967295"),
    "seed": (lambda seed: 0 <= seed < 2**32, "must be from 0 to 4294967295"),
}
"""Those of the arguments, and what transformers understands in a way that nobody means."""


def require_ranges(values: Mapping[str, Any], *, typed: Mapping[str, str]) -> None:
    """Refuse numbers that no run can have; `typed` has names as they were typed."""
    for name, (holds, rule) in _RANGES.items():
        value = values.get(name)
        if value is None or holds(value):
            continue
        word = typed.get(name, name)
        subject = "" if word == name else f"{name} "
        raise ValueError(f"{word}={value!r}: {subject}{rule}")
    _require_intervals(values, typed=typed)
    budget = values.get("memory_budget")
    if budget is not None:
        Gpu.parse(budget, argument="memory_budget")


def _require_intervals(values: Mapping[str, Any], *, typed: Mapping[str, str]) -> None:
    """An interval of 0 is never there, without a word: a run would end without a checkpoint."""
    for what in ("logging", "save", "eval"):
        name, strategy = f"training.{what}_steps", f"training.{what}_strategy"
        by_steps = values.get(strategy, "no" if what == "eval" else "steps") == "steps"
        steps = values.get(name)
        if by_steps and steps is not None and not 0 < steps < math.inf:
            word = typed.get(name, name)
            raise ValueError(f"{word}={steps!r}: {name} must be above 0, or set {strategy}=no")
