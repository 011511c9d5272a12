"""Which families a test runs: the four of every test, three with new structure, all at night.

An ordinary run holds every strategy to the whole contract on the four families and on one of three
that bring new structure, in turn; `tests/test_families.py` trains and plans all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from memrt.testing import FAMILIES, TINY_FAMILIES

__all__ = ["NEW_STRUCTURE", "OTHER_FAMILIES", "contract_cases"]

NEW_STRUCTURE = ("t5", "mixtral", "vit")
"""An encoder and a decoder, a mixture of experts, a model without text."""

OTHER_FAMILIES = tuple(family for family in TINY_FAMILIES if family not in FAMILIES)


def contract_cases(names: Sequence[str]) -> list[Any]:
    """(strategy, family) for every family; slow for all but five families of each strategy."""
    ordinary = [(name, family) for name in names for family in FAMILIES]
    ordinary += [(name, NEW_STRUCTURE[i % len(NEW_STRUCTURE)]) for i, name in enumerate(names)]
    nightly = [
        pytest.param(name, family, marks=pytest.mark.slow)
        for name in names
        for family in OTHER_FAMILIES
        if (name, family) not in ordinary
    ]
    return [*ordinary, *nightly]
