"""Stacks of strategies on the command line: `lisa`, `"galore(rank=64)+int8_states"`, `none`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memrt import registry

if TYPE_CHECKING:
    from memrt.strategy import Strategy

__all__ = ["EMPTY", "Stack", "parse_stack", "parse_stacks", "split_stack"]

EMPTY = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Strategies that run together; `label` has them in the user's order, spelled canonically."""

    label: str
    strategies: tuple[Strategy, ...]


def split_stack(text: str) -> list[str]:
    """Split at every `+` that is in neither parentheses nor quotes."""
    parts = [""]
    depth, quote = 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "+" and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts]


def parse_stack(texts: Sequence[str]) -> Stack:
    """All words together as one stack."""
    names = [part for text in texts for part in split_stack(text)]
    if "" in names:
        raise ValueError(f"strategies {' '.join(texts)!r}: a name is missing beside a +")
    if EMPTY in names and len(names) > 1:
        raise ValueError(f"strategies {' '.join(texts)!r}: {EMPTY!r} stands for no strategy, alone")
    strategies = [registry.parse(name) for name in names if name != EMPTY]
    label = "+".join(map(str, strategies)) or EMPTY
    return Stack(label=label, strategies=tuple(registry.parse_all(strategies)))


def parse_stacks(texts: Sequence[str]) -> list[Stack]:
    """Every word a stack of its own; a stack that is listed twice is refused."""
    stacks = [parse_stack([text]) for text in texts]
    seen: set[frozenset[str]] = set()
    for stack in stacks:
        key = frozenset(map(str, stack.strategies))
        if key in seen:
            raise ValueError(f"stack {stack.label!r} is listed twice; keep one of them")
        seen.add(key)
    return stacks
