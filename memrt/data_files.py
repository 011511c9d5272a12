"""Reads ``.txt`` and ``.jsonl`` and names the line where one is wrong, before any of it is tokenised.

A ``.txt`` file is one text stream, blank lines kept. A ``.jsonl`` file holds one object a line: text, a prompt
with its completion, or chat messages; columns are found by their usual names or named by the user. Lines are parsed
here and not by Arrow's reader: that one knows no line numbers, refuses unused columns of mixed type and turns
text that looks like a date into a timestamp. Files are streamed: one line (or ``_PIECE_CHARACTERS``) at a time.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from memrt.tokenization import embedded_text

__all__ = ["FORMATS", "Kind", "RecordFile", "Row", "TextStream", "file_format"]

FORMATS = (".txt", ".jsonl")
Kind = Literal["text", "prompt_completion", "chat"]

_USUAL_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
}
# Fast tokenizers keep offsets and strings of all tokens of a call (over 100 bytes a token), so a stream is
# tokenised in pieces of about this size; 64 Ki characters keep that near 2 MB.
_PIECE_CHARACTERS = 65536


@dataclass(frozen=True, slots=True)
class Row:
    """The wanted columns of one line."""

    line: int
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStream:
    """A ``.txt`` file, or the embedded text where ``path`` is None."""

    path: str | None

    @property
    def name(self) -> str:
        return "the embedded text (pydoc_data.topics)" if self.path is None else self.path

    def check(self) -> None:
        if self.path is not None and not any(
            line.strip() for _, line in _read_lines(self.path, "path")
        ):
            raise ValueError(f"{self.path}: the file is empty or blank; it must hold text")

    def pieces(self) -> Iterator[str]:
        """The text in pieces that end before a line that starts with a visible character.

        Pre-tokenizers split there anyway, so that the tokens are those of the whole text at once.
        """
        if self.path is None:
            lines: Iterable[str] = io.StringIO(embedded_text())
        else:
            lines = (line for _, line in _read_lines(self.path, "path"))
        held: list[str] = []
        held_characters = 0
        for line in lines:
            if held_characters >= _PIECE_CHARACTERS and not line[0].isspace():
                yield "".join(held)
                held, held_characters = [], 0
            held.append(line)
            held_characters += len(line)
        if held:
            yield "".join(held)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFile:
    """A ``.jsonl`` file whose ``columns`` hold what ``kind`` needs."""

    path: str
    kind: Kind
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: str, named: Mapping[Kind, tuple[str, ...]], argument: str) -> RecordFile:
        """``named``: the columns that the user named; without any, the first line's usual names decide."""
        first = next((_parse(path, n, line) for n, line in _read_lines(path, argument)), None)
        if first is None:
            raise ValueError(f"{path}: the file is empty; it must hold one JSON object a line")
        if named:
            [(kind, columns)] = named.items()
            return cls(path=path, kind=kind, columns=columns)
        found = [kind for kind, usual in _USUAL_COLUMNS.items() if first.keys() >= set(usual)]
        if len(found) == 1:
            return cls(path=path, kind=found[0], columns=_USUAL_COLUMNS[found[0]])
        problem = "more than one" if found else "none"
        raise ValueError(
            f"{path}, line 1: {problem} of 'text', 'prompt' with 'completion' and 'messages' is there; the "
            f"columns are {_listed(first)}: name yours with text_column, with prompt_column and "
            "completion_column, or with messages_column"
        )

    def check(self) -> int:
        """Reads every line, raises at the first wrong one, returns their number."""
        return sum(1 for _ in self.rows())

    def rows(self) -> Iterator[Row]:
        for number, line in _read_lines(self.path, "path"):
            where = f"{self.path}, line {number}"
            record = _parse(self.path, number, line)
            values = tuple(_value(record, column, where) for column in self.columns)
            for column, value in zip(self.columns, values, strict=True):
                if self.kind == "chat":
                    _check_messages(value, f"{where}, column {column!r}")
                else:
                    hint = " (for chat messages use messages_column)" * isinstance(value, list)
                    _check_text(value, f"{where}, column {column!r}", hint)
            yield Row(number, values)


def file_format(path: str, argument: str = "path") -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(
            f"{argument}={path!r}: the file's extension must be {' or '.join(FORMATS)}"
        )
    return suffix


def _read_lines(path: str, argument: str) -> Iterator[tuple[int, str]]:
    """Lines with their ends, counted from 1; only a line feed ends a line."""
    if not Path(path).is_file():
        problem = "this is a folder" if Path(path).is_dir() else "there is no such file"
        raise ValueError(
            f"{argument}={path!r}: {problem}; give a {' or '.join(FORMATS)} file "
            f"(relative paths start at {Path.cwd()})"
        )
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            body = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                text = body.decode("utf-8")
            except UnicodeDecodeError as error:
                at = len(raw) - len(body) + error.start
                raise ValueError(
                    f"{path}, line {number}: byte {at + 1} of the line (offset {offset + at} of the file) is not "
                    f"UTF-8 ({error.reason}); save the file as UTF-8"
                ) from error
            offset += len(raw)
            if text:
                yield number, text


def _parse(path: str, number: int, line: str) -> dict[str, Any]:
    where = f"{path}, line {number}"
    if not line.strip():
        raise ValueError(f"{where}: the line is empty; every line must be one JSON object")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: malformed JSON at character {error.pos + 1}: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: JSON that cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object with named columns, not {_shown(record)}")
    return record


def _value(record: dict[str, Any], column: str, where: str) -> Any:
    if column in record:
        return record[column]
    near = get_close_matches(column, record, n=1)
    nearest = f" (nearest: {near[0]!r})" if near else ""
    raise ValueError(f"{where}: no column {column!r}; the columns are {_listed(record)}{nearest}")


def _check_text(value: Any, where: str, hint: str = "") -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: must be text, not {_shown(value)}{hint}")
    if not value.strip():
        raise ValueError(f"{where}: the text is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} is half of a surrogate pair and no valid Unicode"
        ) from error


def _check_messages(value: Any, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: must be a list of messages, not {_shown(value)}")
    for index, message in enumerate(value, start=1):
        here = f"{where}, message {index}"
        if not isinstance(message, dict):
            raise ValueError(
                f"{here}: must be an object with 'role' and 'content', not {_shown(message)}"
            )
        for key in ("role", "content"):
            _check_text(_value(message, key, here), f"{here}, {key!r}")
    if all(message["role"] != "assistant" for message in value):
        raise ValueError(
            f"{where}: no message has the role 'assistant', so there is nothing to train on"
        )


def _listed(record: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in record) if record else "none"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
