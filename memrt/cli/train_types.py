"""Types of settings: whether a value fits an annotation, and what to call the annotation."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

__all__ = ["in_words", "require_type"]

_MAX_LISTED = 8


def in_words(hint: Any) -> str:
    """An annotation as an error or a help text says it."""
    return " or ".join(dict.fromkeys(_in_words(branch) for branch in _branches(hint)))


def require_type(name: str, hint: Any, value: Any) -> None:
    """Refuse a value of another type, or none of the words that a setting can have."""
    branches = _branches(hint)
    words = [word for branch in branches for word in _words(branch)]
    if isinstance(value, str) and words and str not in branches:
        if value in words:
            return
        close = get_close_matches(value, words, n=1, cutoff=0.6)
        nearest = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}={value!r}: must be {in_words(hint)}{nearest}")
    if not any(_accepts(branch, value) for branch in branches):
        items = [_items(branch) for branch in branches if _is_list(branch)]
        if isinstance(value, list) and items:
            wrong = next(i for i in value if not any(_accepts(b, i) for b in _branches(items[0])))
            raise ValueError(
                f"{name}={value!r}: {_shown(wrong)} in the list must be {in_words(items[0])}"
            )
        raise ValueError(f"{name}={_shown(value)}: must be {in_words(hint)}")


def _is_list(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) is list


def _items(hint: Any) -> Any:
    """What the items of a list are."""
    return (typing.get_args(hint) or (Any,))[0]


def _branches(hint: Any) -> tuple[Any, ...]:
    """The types of a union; where words are listed, plain text beside them says nothing more."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    branches = typing.get_args(hint) if union else (hint,)
    if any(isinstance(each, type) and issubclass(each, enum.Enum) for each in branches):
        branches = tuple(each for each in branches if each is not str)
    return branches


def _words(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [word for word in typing.get_args(hint) if isinstance(word, str)]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [str(member.value) for member in hint]
    return []


def _in_words(hint: Any) -> str:
    words = _words(hint)
    if len(words) > _MAX_LISTED:
        return f"one of {', '.join(words[:_MAX_LISTED])}, ..."
    if words:
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if typing.get_origin(hint) is Literal:
        return ", ".join(str(word).lower() for word in typing.get_args(hint))
    plain = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
        types.NoneType: "null",
    }
    return plain.get(typing.get_origin(hint) or hint, "a value")


def _accepts(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in typing.get_args(hint))
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is dict:
        return isinstance(value, Mapping)
    if origin is list:
        inner = _branches(_items(hint))
        return isinstance(value, list) and all(
            any(each is Any or _accepts(each, item) for each in inner) for item in value
        )
    return isinstance(origin, type) and isinstance(value, origin)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return repr(value)
