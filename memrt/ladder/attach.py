"""How a ladder meets a model: blocks that climb, a join, an evaluation mode that stays.

Nothing of the model is forked: its blocks are recast to a class whose forward runs the block
without gradients and then its rung; the final norm (or, where there is none, the last block) joins.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache, wraps
from itertools import pairwise
from types import CodeType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from memrt.ladder.rung import Call, EncoderEnd, Join, Rung
from memrt.structure import LayerStack, Structure
from memrt.surgery import subclass_of

__all__ = [
    "CHILD",
    "climbing",
    "final_norm",
    "holders",
    "joining",
    "modules_before_the_join",
    "resting",
    "rotary_modules",
    "still",
    "task_head",
    "turn",
    "turning",
]

_Kind: TypeAlias = Any  # a module's class: mypy does not take those for hashable

CHILD = "ladder"
"""The name under which the side network's parts hang below the backbone's."""


class _Resting:
    """Stays in evaluation mode: a frozen backbone drops nothing out."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


@cache
def resting(kind: _Kind) -> type[nn.Module]:
    """A class that stays in evaluation mode."""
    return subclass_of(kind, _Resting)


class _Still:
    """Is in evaluation mode itself, its children in theirs."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]
        self.training = False
        return self


@cache
def still(kind: _Kind) -> type[nn.Module]:
    """A class that by its own forward drops out no channel and skips no block."""
    return subclass_of(kind, _Still)


@cache
def climbing(kind: _Kind) -> type[nn.Module]:
    """A block that runs without gradients, and its rung after it."""
    plain = kind.forward
    names = tuple(inspect.signature(plain).parameters)[1:]

    class Climbing:
        ladder: Rung
        training: bool
        _modules: dict[str, nn.Module]

        @wraps(plain)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            call = Call(names, args, kwargs)
            if self.ladder.training and torch.is_grad_enabled():
                call = call.without_cache()  # keys and values that nobody would read
            self.ladder.prepare(call)
            with torch.no_grad():
                output = plain(self, *call.args, **call.kwargs)
            return self.ladder(call, output)

        def train(self, mode: bool = True) -> Any:
            super().train(False)  # type: ignore[misc]
            self.ladder.train(mode)
            return self

    if not issubclass(kind, nn.Sequential):
        return subclass_of(kind, Climbing)

    class WithoutRung(Climbing):
        """Runs its children in a row, of which its rung is none."""

        def __iter__(self) -> Iterator[nn.Module]:
            return (child for name, child in self._modules.items() if name != CHILD)

        def __len__(self) -> int:
            return len(self._modules) - (CHILD in self._modules)

    return subclass_of(kind, WithoutRung)


@cache
def joining(kind: _Kind) -> type[nn.Module]:
    """A final norm whose output is joined with the side's end."""
    plain = kind.forward

    class Joining:
        ladder: Join | EncoderEnd

        @wraps(plain)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                output: Tensor = plain(self, *args, **kwargs)
            return self.ladder(output)

        def train(self, mode: bool = True) -> Any:
            super().train(False)  # type: ignore[misc]
            self.ladder.train(mode)
            return self

    return subclass_of(kind, Joining)


class _Turn(nn.Module):
    """The side's rotary embedding, called whenever the backbone's is."""

    def __init__(self, rotary: nn.Module, streams: list[Any]) -> None:
        super().__init__()
        self.rotary = rotary
        self.streams = streams

    def forward(self, ours: Any, *args: Any, **kwargs: Any) -> None:
        side = self.rotary(*args, **kwargs)
        for stream in self.streams:
            stream.remember_rotary(ours, side)


@cache
def turning(kind: _Kind) -> type[nn.Module]:
    """A rotary embedding that makes the side's at the same positions."""
    plain = kind.forward

    class Turning:
        ladder: nn.Module

        @wraps(plain)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = plain(self, *args, **kwargs)
            self.ladder(output, *args, **kwargs)
            return output

    return subclass_of(kind, Turning)


def turn(rotary: nn.Module, streams: list[Any]) -> nn.Module:
    """What hangs below the backbone's rotary embedding."""
    return _Turn(rotary, streams)


# ---------------------------------------------------------------- finding


def _path(name: str) -> list[str]:
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def _child(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def final_norm(model: nn.Module, stack: LayerStack) -> str | None:
    """The norm after a stack: a norm module that is used behind it, beside it or further out.

    Only within the model's body: a norm in a head comes after other layers.
    """
    path = _path(stack.name)
    for parent, inside in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
        module = model.get_submodule(parent)
        for child_name, child in module.named_children():
            is_norm = "norm" in type(child).__name__.lower()
            if is_norm and _follows(module, child_name, inside.rpartition(".")[2]):
                return _child(parent, child_name)
        if hasattr(module, "config") and hasattr(module, "base_model_prefix"):
            return None  # the body ends here
    return None


def _follows(parent: nn.Module, name: str, stack: str) -> bool:
    """Whether the forward of `parent` uses a child only after another.

    BART registers the norm of its embeddings behind the blocks, and T5Gemma its final norm before
    them; what neither is seen in the forward goes by the order in which it was registered.
    """
    code: CodeType = inspect.unwrap(type(parent).forward).__code__
    used = [each for each in code.co_names if each in (stack, name)]  # by their first use
    if len(used) < 2:
        used = [each for each, _ in parent.named_children() if each in (stack, name)]
        if "embedding" in name or name.endswith("_emb"):
            return False
    return used == [stack, name]


def holders(model: nn.Module, stack: LayerStack, body: str) -> list[str]:
    """The modules whose own forward goes through a stack: its body and what lies between.

    They drop out by functions, of embeddings (BART) or whole blocks (`layerdrop`). Not the model,
    whose mode says whether it trains.
    """
    inside = [name for name in _path(stack.name)[:-1] if name]
    return [name for name in inside if not body or f"{name}.".startswith(f"{body}.")]


def rotary_modules(body: nn.Module, inside: set[int]) -> list[str]:
    """Rotary embeddings of a body outside its blocks, by name."""
    return [
        name
        for name, module in body.named_modules()
        if "rotary" in type(module).__name__.lower() and id(module) not in inside
    ]


def modules_before_the_join(model: nn.Module, structure: Structure) -> list[str]:
    """Modules outside the blocks that run before the side joins: embeddings and their dropout."""
    found: list[str] = []
    on_path = {name for stack in structure.stacks for name in _path(stack.name)}
    norms = {final_norm(model, stack) for stack in structure.stacks}
    for stack in structure.stacks:
        for parent in _path(stack.name)[:-1]:
            behind = False
            for child_name, child in model.get_submodule(parent).named_children():
                name = _child(parent, child_name)
                behind = behind or name in on_path
                # T5 uses one dropout before and behind its blocks
                dropout = isinstance(child, nn.Dropout) and parent == _path(stack.name)[-2]
                known = name in on_path or name in norms or name in found
                if not known and (not behind or dropout):
                    found.append(name)
    return found


def task_head(model: nn.Module, structure: Structure) -> list[str]:
    """Names of the parameters behind the join, in a model without a language-model head."""
    if structure.head is not None or structure.body is None:
        return []
    found = []
    for stack in structure.stacks:
        norm = final_norm(model, stack)
        path = _path(stack.name)
        for parent, inside in pairwise(path):
            behind = False
            for child_name, child in model.get_submodule(parent).named_children():
                name = _child(parent, child_name)
                if name == inside:
                    behind = True
                elif behind and name != norm:
                    found += [_child(name, parameter) for parameter, _ in child.named_parameters()]
    return found
