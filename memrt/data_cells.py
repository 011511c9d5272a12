"""Checks of one value of a record; every error names file, line or row, and column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from memrt.errors import nearest

__all__ = ["check_messages", "check_text", "label_text", "listed", "value_of"]

_MOST_NAMES = 12


def value_of(record: Mapping[str, Any], column: str, where: str) -> Any:
    """A column of a record; `ValueError` with the nearest name where it has none."""
    if column in record:
        return record[column]
    raise ValueError(
        f"{where}: no column {column!r}; the columns are {listed(record)}{nearest(column, record)}"
    )


def check_text(value: Any, where: str) -> None:
    """Text that is not blank, and valid Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: must be text, not {_shown(value)}")
    if not value.strip():
        raise ValueError(f"{where}: the text is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} is half of a surrogate pair and no valid Unicode"
        ) from error


def check_messages(value: Any, where: str) -> None:
    """Chat messages, one of them the assistant's."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: must be a list of messages, not {_shown(value)}")
    for index, message in enumerate(value, start=1):
        here = f"{where}, message {index}"
        if not isinstance(message, dict):
            raise ValueError(
                f"{here}: must be an object with 'role' and 'content', not {_shown(message)}"
            )
        for key in ("role", "content"):
            check_text(value_of(message, key, here), f"{here}, {key!r}")
    if all(message["role"] != "assistant" for message in value):
        raise ValueError(
            f"{where}: no message has the role 'assistant', so there is nothing to train on"
        )


def label_text(value: Any, where: str) -> str:
    """A class as text: its name, or its number in digits."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{where}: a label must be text or a whole number, not {_shown(value)}")
    if isinstance(value, str):
        check_text(value, where)
    return str(value).strip()


def listed(names: Iterable[str]) -> str:
    """Names for an error."""
    found = [_short(name) for name in names]
    more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return (", ".join(found[:_MOST_NAMES]) or "none") + more


def _short(name: str) -> str:
    text = repr(name)
    return text if len(text) <= 40 else f"{text[:36]}...'"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:37]}..."
