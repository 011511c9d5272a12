"""A whole number for each parameter of an optimizer, which outlives the parameter's state.

What rounds stochastically must not draw the same random bits twice for a parameter: bits that come
back send the same elements the same way, and the others never move. A parameter's state, and a step
counter in it, may be freed and made anew many times (LISA, BAdam); these numbers stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

__all__ = ["ParameterCounts"]


class ParameterCounts:
    """Counts on the host, in the order in which the parameters were given."""

    def __init__(self) -> None:
        self._number: dict[nn.Parameter, int] = {}
        self._counts: list[int] = []

    def add(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count for these too, from 0."""
        for parameter in parameters:
            self._number[parameter] = len(self._counts)
            self._counts.append(0)

    def number(self, parameter: nn.Parameter) -> int:
        """Which parameter it is, from 0: its index in a state dict."""
        return self._number[parameter]

    def count(self, parameter: nn.Parameter) -> int:
        """How far it is."""
        return self._counts[self._number[parameter]]

    def advance(self, parameter: nn.Parameter) -> None:
        """One more."""
        self._counts[self._number[parameter]] += 1

    def saved(self) -> list[int]:
        """All of them, for a state dict."""
        return list(self._counts)

    def load(self, counts: Sequence[int]) -> None:
        """Go on from what `saved` gave for as many parameters."""
        if len(counts) != len(self._counts):
            raise ValueError(
                f"counts of {len(counts)} parameters are given to an optimizer of "
                f"{len(self._counts)}; resume with the parameters that wrote the state"
            )
        self._counts = [int(count) for count in counts]
