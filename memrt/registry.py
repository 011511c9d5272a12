"""Strategies by name: `"galore(rank=128)"` strings, JSON, and third parties' entry points."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from memrt.errors import nearest, unknown_name
from memrt.spellings import PREFIXES, REFUSED_KEYS, options_of, own_options
from memrt.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ENTRY_POINT_GROUP",
    "from_json",
    "names",
    "parse",
    "parse_all",
    "register",
    "strategy_class",
]

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "memrt.strategies"

_BUILT_IN = {
    "activation_checkpoint": "memrt.strategies.activation_checkpoint",
    "adalomo": "memrt.strategies.adalomo",
    "apollo": "memrt.strategies.apollo",
    "apollo_mini": "memrt.strategies.apollo_mini",
    "badam": "memrt.strategies.badam",
    "fira": "memrt.strategies.fira",
    "fp8_states": "memrt.strategies.fp8_states",
    "fused_lora": "memrt.strategies.fused_lora",
    "fused_loss": "memrt.strategies.fused_loss",
    "galore": "memrt.strategies.galore",
    "in_backward": "memrt.strategies.in_backward",
    "int8": "memrt.strategies.int8",
    "int4_states": "memrt.strategies.int4_states",
    "int8_states": "memrt.strategies.int8_states",
    "ladder": "memrt.strategies.ladder",
    "lisa": "memrt.strategies.lisa",
    "nf4": "memrt.strategies.nf4",
    "lomo": "memrt.strategies.lomo",
    "offload_activations": "memrt.strategies.offload_activations",
    "peft": "memrt.strategies.peft",
    "q_galore": "memrt.strategies.q_galore",
}
_registered: dict[str, type[Strategy]] = {}

StrategyClass = TypeVar("StrategyClass", bound=type[Strategy])


def register(cls: StrategyClass) -> StrategyClass:
    """Register a strategy class under its `name` (class decorator)."""
    if not cls.name.isidentifier():
        raise ValueError(f"{cls.__name__}.name is {cls.name!r}; it must be a Python identifier")
    known = _registered.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(
            f"strategy name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}; "
            f"choose another name for {cls.__module__}.{cls.__qualname__}"
        )
    _registered[cls.name] = cls
    return cls


@cache
def _third_party() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def names() -> list[str]:
    """Every known strategy: built in, registered, and from entry points."""
    return sorted({*_BUILT_IN, *_registered, *_third_party()})


def strategy_class(name: str) -> type[Strategy]:
    """The class behind a name. Raises `ValueError` with the nearest name when there is none."""
    if name not in _registered:
        if name in _BUILT_IN:
            import_module(_BUILT_IN[name])
        elif name in _third_party():
            register(_third_party()[name].load())
        else:
            raise unknown_name("strategy", name, names())
    return _registered[name]


def _build(name: str, options: Mapping[str, Any]) -> Strategy:
    cls = strategy_class(name)
    known = [f.name for f in fields(cls)]
    options = _under_own_names(name, options, known)
    for option in options:
        if option not in known:
            raise ValueError(
                f"strategy {name!r} has no option {option!r}{nearest(option, known)} "
                f"(options: {', '.join(known) or 'none'})"
            )
    return cls(**options)


def _under_own_names(
    name: str, options: Mapping[str, Any], known: Sequence[str]
) -> Mapping[str, Any]:
    """Options under memrt's names, with a warning where they had another project's."""
    prefix = PREFIXES.get(name)
    if prefix is None or all(option in known for option in options):
        return options
    for option in options:
        if option not in known and f"{prefix}{option}" in REFUSED_KEYS:
            raise ValueError(f"{name}({option}=...): {REFUSED_KEYS[f'{prefix}{option}']}")
    found = own_options(options, options_of(name), known=known, subject=name)
    others = [option for option in options if option not in found]
    if others:
        logger.warning("%s: %s: memrt's names are %s", name, ", ".join(others), found)
    return found


def _call(text: str) -> ast.Call | ast.Name:
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        node = None
    if isinstance(node, ast.Name):
        return node
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        raise ValueError(
            f"strategy {text!r} joins several with '+', as the command line does; give each as an "
            "element of the list"
        )
    raise ValueError(
        f"strategy {text!r} is not of the form name or name(option=value, ...), "
        "for example 'galore(rank=128, every=200)'"
    )


def parse(spec: str | Strategy | Mapping[str, Any]) -> Strategy:
    """One strategy from `"name(option=value)"`, from JSON, or itself."""
    if isinstance(spec, Strategy):
        return spec
    if isinstance(spec, Mapping):
        return from_json(spec)
    if not isinstance(spec, str):
        raise ValueError(
            f"strategy {spec!r}: must be text such as 'galore(rank=128)', a mapping, or a Strategy "
            "object"
        )
    node = _call(spec)
    if isinstance(node, ast.Name):
        return _build(node.id, {})
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"strategy {spec!r}: options need names, as in galore(rank=128)")
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg in options:
            raise ValueError(f"strategy {spec!r}: {keyword.arg!r} is given twice; keep one of them")
        try:
            options[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            raise ValueError(
                f"strategy {spec!r}: the value of {keyword.arg!r} is not a plain value "
                "(number, 'string', True, False, None, list)"
            ) from None
    assert isinstance(node.func, ast.Name)
    return _build(node.func.id, options)


def from_json(value: Mapping[str, Any]) -> Strategy:
    """The inverse of `Strategy.to_json`; also accepts YAML's `{"galore": {"rank": 128}}`."""
    if "name" in value:
        return _build(str(value["name"]), {k: v for k, v in value.items() if k != "name"})
    if len(value) == 1:
        ((name, options),) = value.items()
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(
                f"strategy {dict(value)!r}: its options must be a mapping, such as "
                "{'galore': {'rank': 128}}"
            )
        return _build(str(name), dict(options or {}))
    raise ValueError(f"strategy {dict(value)!r} has no 'name'")


def parse_all(specs: Iterable[str | Strategy | Mapping[str, Any]]) -> list[Strategy]:
    """A stack of strategies in phase order; the same strategy twice is refused."""
    if isinstance(specs, str):
        raise ValueError(f"strategies must be a list, got the string {specs!r}; write [{specs!r}]")
    if isinstance(specs, (Mapping, Strategy)):  # a mapping's values would be lost
        shown = repr(dict(specs) if isinstance(specs, Mapping) else str(specs))
        raise ValueError(f"strategies must be a list, got {shown}; write [{shown}]")
    if not isinstance(specs, Iterable):
        raise ValueError(f"strategies={specs!r}: must be a list, such as ['lisa', 'int8_states']")
    strategies = [parse(spec) for spec in specs]
    seen: set[str] = set()
    for strategy in strategies:
        if strategy.name in seen:
            raise ValueError(f"strategy {strategy.name!r} is listed twice; keep one of them")
        seen.add(strategy.name)
    return sorted(strategies, key=lambda strategy: (strategy.phase, strategy.name))
