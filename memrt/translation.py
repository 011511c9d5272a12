"""From other projects' arguments (`memrt.spellings`) to strategies, and one warning for all.

`optim="galore_adamw"` of transformers needs another package there, cannot be resumed and, layer by
layer, neither accumulates nor clips. Here it means a strategy, which does all of that.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from memrt import registry
from memrt.errors import nearest
from memrt.spellings import (
    IMPLIED,
    KEYS,
    OPTIMIZERS,
    REFUSED_KEYS,
    is_spelling,
    own_options,
)
from memrt.strategy import Strategy

__all__ = [
    "TORCH_ADAMW",
    "from_keys",
    "from_optim",
    "join",
    "tell_optim",
    "translated",
    "with_own_optimizer",
]

TORCH_ADAMW = "adamw_torch"
"""The `optim` of a run whose strategies make the optimizer."""

logger = logging.getLogger(__name__)

_SECTIONS = ("training", "model")
_OPTIM = ("optim", "optim_args", "optim_target_modules")


def from_optim(
    optim: Any, optim_args: str | None, target_modules: Any, *, max_grad_norm: float | None
) -> list[Strategy]:
    """The strategies behind an `optim` of transformers; none where it stays transformers' own."""
    name = str(getattr(optim, "value", optim))
    optimizer = OPTIMIZERS.get(name)
    if optimizer is None:
        return []
    given = _parsed(optim_args)
    for option in given:
        if option not in optimizer.options:
            raise ValueError(
                f"optim_args: optim={name!r} has no option {option!r}"
                f"{nearest(option, optimizer.options)} "
                f"(options: {', '.join(optimizer.options) or 'none'})"
            )
    options = own_options({**optimizer.defaults, **given}, optimizer.options, subject="optim_args")
    if not optimizer.takes_targets and target_modules is not None:
        raise ValueError(
            f"optim_target_modules={target_modules!r} has no effect with optim={name!r}; leave it "
            "out"
        )
    if optimizer.takes_targets:
        options["targets"] = _targets(name, target_modules)
    first, *others = optimizer.strategies
    try:
        return [
            _built(first, {**IMPLIED.get(first, {}), **options}, max_grad_norm),
            *(_built(other, {}, max_grad_norm) for other in others),
        ]
    except ValueError as error:
        raise ValueError(f"optim={name!r}, optim_args={optim_args!r}: {error}") from None


def tell_optim(optim: Any, strategies: Sequence[Strategy]) -> None:
    """Say what an `optim` became."""
    name = str(getattr(optim, "value", optim))
    note = OPTIMIZERS[name].note
    logger.warning(
        "optim=%r is run as strategies=%s%s",
        name,
        [str(strategy) for strategy in strategies],
        f" ({note})" if note else "",
    )


def with_own_optimizer(arguments: Any) -> tuple[Any, list[Strategy]]:
    """A Trainer's arguments, and the strategies that their `optim` means.

    With such an `optim` they are a copy of which transformers sees its AdamW: the caller's may go
    to another Trainer. `memrt.TrainingArguments` have done this themselves.
    """
    found = from_optim(
        arguments.optim,
        arguments.optim_args,
        arguments.optim_target_modules,
        max_grad_norm=arguments.max_grad_norm,
    )
    if not found:
        return arguments, []
    tell_optim(arguments.optim, found)
    own = copy.copy(arguments)
    own.optim, own.optim_args, own.optim_target_modules = TORCH_ADAMW, None, None
    return own, found


def from_keys(
    given: Mapping[str, Any], listed: Sequence[Strategy], *, max_grad_norm: float | None
) -> list[Strategy]:
    """The strategies that other projects' keys ask for, beside those that are listed."""
    wanted, added = _sorted_out(given)
    by_name = {strategy.name: strategy for strategy in listed}
    found = []
    for name, keys in wanted.items():
        others = {key: KEYS[key] for key in keys}
        options = own_options(keys, others)
        if name not in by_name:
            found.append(_built(name, {**IMPLIED.get(name, {}), **options}, max_grad_norm))
            continue
        for option, value in options.items():
            if getattr(by_name[name], option) != getattr(_built(name, options, None), option):
                raise ValueError(
                    f"{_words(keys)}: strategies has {by_name[name]} and this says "
                    f"{option}={value!r}; give one of them"
                )
    found += [_built(name, {}, max_grad_norm) for name in added if name not in by_name]
    return found


def join(listed: Sequence[Strategy], found: Sequence[Strategy], *, subject: str) -> list[Strategy]:
    """Both; a strategy that is in both must be the same."""
    by_name = {strategy.name: strategy for strategy in listed}
    for strategy in found:
        if by_name.get(strategy.name, strategy) != strategy:
            raise ValueError(
                f"{subject} means {strategy}, and strategies has {by_name[strategy.name]}; give "
                "one of them"
            )
    return [*listed, *(strategy for strategy in found if strategy.name not in by_name)]


def translated(tree: Mapping[str, Any], *, base: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `memrt train` file with other projects' keys turned into `strategies`.

    `base` has settings by full name that the file is laid over.
    """
    rest, keys = _taken(tree)
    training = dict(rest["training"]) if isinstance(rest.get("training"), dict) else {}
    optim = {name: training.get(name) for name in _OPTIM}
    norm = training.get("max_grad_norm", base.get("training.max_grad_norm", 1.0))
    found = from_optim(*optim.values(), max_grad_norm=norm)
    if not keys and not found:
        return rest
    words = _words(keys)
    specs = rest.get("strategies", base.get("strategies"))
    if "memory_strategies" in keys:
        theirs = keys.pop("memory_strategies")
        if rest.get("strategies", theirs) != theirs:
            raise ValueError(
                f"memory_strategies={theirs!r} and strategies={specs!r} are the same setting; give "
                "strategies alone"
            )
        specs = theirs
    listed = registry.parse_all(specs or [])
    if found:
        listed = join(listed, found, subject=f"training.optim={optim['optim']!r}")
        tell_optim(optim["optim"], found)
        rest["training"] = {n: v for n, v in training.items() if n not in _OPTIM}
    listed += from_keys(keys, listed, max_grad_norm=norm)
    if words:
        logger.warning("%s: run as strategies=%s", words, [str(strategy) for strategy in listed])
    rest["strategies"] = [str(strategy) for strategy in listed]
    return rest


def _taken(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings without other projects' keys, and those."""
    keys: dict[str, Any] = {}
    rest = dict(tree)
    for section in ("", *_SECTIONS):
        place = rest if not section else rest.get(section)
        if not isinstance(place, dict):
            continue
        for key in [key for key in place if is_spelling(str(key))]:
            if keys.get(key, place[key]) != place[key]:
                raise ValueError(
                    f"{key}={keys[key]!r} and {section}.{key}={place[key]!r}: give one"
                )
            keys[key] = place[key]
        kept = {name: value for name, value in place.items() if not is_spelling(str(name))}
        if section:
            rest[section] = kept
        else:
            rest = kept
    return rest, keys


def _sorted_out(given: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Keys by strategy, and strategies that are asked for beside them."""
    wanted: dict[str, dict[str, Any]] = {}
    added: list[str] = []
    off: dict[str, str] = {}
    for key, value in given.items():
        if key in REFUSED_KEYS:
            raise ValueError(f"{key}={value!r}: {REFUSED_KEYS[key]}")
        spelling = KEYS[key]
        if spelling.is_switch or spelling.adds:
            result = spelling.value(key, value)
            if not result:
                if spelling.is_switch:
                    off[spelling.strategy] = key
                continue
            if spelling.adds and spelling.adds not in added:
                added.append(spelling.adds)
        options = wanted.setdefault(spelling.strategy, {})
        if spelling.option is not None or (spelling.values and not spelling.is_switch):
            options[key] = value
    for strategy, key in off.items():
        if wanted.get(strategy):
            raise ValueError(
                f"{_words(wanted[strategy])}: no effect with {key}={given[key]!r}; leave one out"
            )
    return wanted, added


def _words(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in keys.items())


def _built(name: str, options: Mapping[str, Any], max_grad_norm: float | None) -> Strategy:
    """A strategy; one that updates in backward clips as the run does, which takes a second pass."""
    known = set(registry.strategy_class(name).__dataclass_fields__)
    if "clip" in known and max_grad_norm:
        options = {"clip": "two_pass", **options}
    return registry.from_json({"name": name, **options})


def _parsed(text: str | None) -> dict[str, Any]:
    """`"rank=64,scale=0.25"` as numbers, truth values and words."""
    found: dict[str, Any] = {}
    for part in (text or "").replace(" ", "").split(","):
        key, equals, value = part.partition("=")
        if not part and not found:
            continue
        if not (key and equals and value):
            raise ValueError(
                f"optim_args={text!r}: must be of the form name=value,name=value, and {part!r} is "
                "not"
            )
        if key in found:
            raise ValueError(f"optim_args={text!r}: {key!r} is given twice; give it once")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _targets(optim: str, modules: Any) -> Any:
    """`optim_target_modules` as `targets`; a text is an expression for the whole name there."""
    if modules is None:
        raise ValueError(
            f"optim={optim!r} needs optim_target_modules; give 'all-linear', a list of parts of "
            "module names, or a regular expression"
        )
    if not isinstance(modules, str):
        return list(modules) if isinstance(modules, (list, tuple, set)) else modules
    if modules.replace("_", "-") == "all-linear":
        return "all-linear"
    # in a list a plain word is a part of a name, too
    return [f"(?:{modules})" if re.fullmatch(r"[\w.]+", modules) else modules]
