"""Which numbers a setting can have, told before anything is read and in the user's own words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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
    budget = values.get("memory_budget")
    if budget is not None:
        Gpu.parse(budget, argument="memory_budget")
