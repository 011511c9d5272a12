"""Checks of values that many settings share. What they refuse would fail later, or mislead."""

from __future__ import annotations

from numbers import Real
from typing import Any

__all__ = ["check_seed", "is_number"]


def is_number(value: Any) -> bool:
    """Whether it is a real number, and not True, False or text that looks like one."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_seed(seed: Any) -> None:
    """Refuse a seed that is no whole number: it must come back from a checkpoint as it was."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed={seed!r}: must be a whole number, such as seed=42")
