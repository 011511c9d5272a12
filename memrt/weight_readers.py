"""Modules that read the weight of a layer below them instead of only calling the layer.

Most write `self.wo(x)`. Some look at `self.wo.weight.dtype`, multiply by `self.dt_proj.weight`, or
hand `self.out_proj.weight` to a fused kernel. What is done to a layer by changing what it holds
(packing its weight) or what it is (adapters on it) then goes wrong, or past them without a word. It
is found in the compiled code of their classes, which also tells it of classes without source.

torch's `nn.TransformerEncoderLayer` does it in a shortcut alone, in evaluation without gradients;
`take_long_way` keeps it from that.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from memrt.surgery import subclass_of

if TYPE_CHECKING:
    from memrt.session import Session

__all__ = ["reader_of", "take_long_way"]

_Kind: TypeAlias = Any  # a module's class: mypy does not take those for hashable

_ONLY_IF = {"BloomAttention": "slow_but_exact", "BloomMLP": "slow_but_exact"}
"""Classes that read a weight only where an attribute of theirs is set."""


def reader_of(model: nn.Module, name: str) -> nn.Module | None:
    """The innermost module around the layer `name` that reads its weight itself, if one does.

    Not torch's encoder layers, which need not.
    """
    # PEFT's layers show their base layer's weight as their own
    parts = tuple(part for part in name.split(".") if part != "base_layer")
    for module in _around(model, name):
        kind: Any = type(module)
        reads = any(parts[-len(path) :] == path for path in _weights_read(kind))
        if reads and not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            switch = _ONLY_IF.get(type(module).__name__)
            if switch is None or getattr(module, switch, True):
                return module
    return None


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around one, from the innermost to the model."""
    while name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


@cache
def _weights_read(kind: _Kind) -> frozenset[tuple[str, ...]]:
    """("mlp", "fc2") of a `self.mlp.fc2.weight` in a class's functions, but for initialization."""
    return frozenset(
        path
        for base in kind.__mro__
        if base is not nn.Module
        for name, member in vars(base).items()
        if "init" not in name
        for code in _codes(member)
        for path in _paths(code)
    )


def _codes(member: Any) -> Iterator[CodeType]:
    """The code of a function, of what decorators keep of it, and of the functions in it."""
    function = member.fget if isinstance(member, property) else member
    function = getattr(function, "__func__", function)  # of static and class methods
    function = inspect.unwrap(function) if callable(function) else function
    codes = [function.__code__] if isinstance(function, FunctionType) else []
    while codes:
        code = codes.pop()
        yield code
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]


def _paths(code: CodeType) -> Iterator[tuple[str, ...]]:
    """The attributes in a row that end in `weight`, without it."""
    if "weight" not in code.co_names:
        return
    path: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_ATTR":
            if instruction.argval == "weight" and path:
                yield path
            path = (*path, instruction.argval)
        elif instruction.opname != "EXTENDED_ARG":
            path = ()


# ---------------------------------------------------------------- torch's shortcut


class _LongWay:
    activation_relu_or_gelu = property(lambda self: 0, lambda self, value: None)
    """Says of a layer that its activation is none that the shortcut knows."""
    use_nested_tensor = property(lambda self: False, lambda self, value: None)
    """Says of an encoder that its layers do not take the shortcut."""


@cache
def _on_the_long_way(kind: _Kind) -> type[nn.Module]:
    return subclass_of(kind, _LongWay)


def take_long_way(run: Session, names: Iterable[str]) -> None:
    """Let torch's encoders around the layers `names` call them always, until `run` detaches."""
    around = {module for name in names for module in _around(run.model, name)}
    for name, module in run.model.named_modules():
        known = isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        if known and module in around and not isinstance(module, _LongWay):
            kind: Any = type(module)
            run.recast(name, _on_the_long_way(kind))
