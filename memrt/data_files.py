"""Reads ``.txt`` and ``.jsonl`` and names the line where one is wrong, before it is tokenised.

A ``.txt`` file is one text stream, blank lines kept. A ``.jsonl`` file holds one object a line:
text, a prompt with its completion, or chat messages; its columns have their usual names or are
named by the user. Lines are parsed here and not by Arrow's reader: that one knows no line numbers,
refuses unused columns of mixed type and turns text that looks like a date into a timestamp. Files
are streamed: one line, or one piece of a text, is in memory at a time.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memrt.errors import nearest
from memrt.tokenization import embedded_text

__all__ = ["FORMATS", "Kind", "RecordFile", "Row", "TextStream", "is_stream", "require_file"]

FORMATS = (".txt", ".jsonl")
Kind = Literal["text", "prompt_completion", "chat"]

_USUAL_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
}
# Fast tokenizers keep offsets and strings for all tokens of a call, over 100 bytes a token: a text
# is tokenised in pieces of about this size, which keeps that at a few MB.
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

    @property
    def kind(self) -> Kind:
        return "text"

    def check(self) -> None:
        """Reads every line, so that all of it is known to be UTF-8."""
        if self.path is not None and not sum(
            1 for _, line in _read_lines(self.path) if line.strip()
        ):
            raise ValueError(f"{self.path}: the file is empty or blank; it must hold text")

    def pieces(self) -> Iterator[str]:
        """The text in pieces that end before a line that starts with a visible character.

        Byte-level pre-tokenizers (GPT-2, Llama 3, Qwen) split there anyway, so that the tokens are
        those of the whole text at once; a SentencePiece one may differ by a token a piece.
        """
        if self.path is None:
            lines: Iterable[str] = io.StringIO(embedded_text())
        else:
            lines = (line for _, line in _read_lines(self.path))
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

    @property
    def name(self) -> str:
        return self.path

    @classmethod
    def open(cls, path: str, named: Mapping[Kind, tuple[str, ...]]) -> RecordFile:
        """``named``: the user's column names; without, the first line must have the usual ones."""
        first = next((_parse(path, n, line) for n, line in _read_lines(path)), None)
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
            f"{path}, line 1: {problem} of 'text', 'prompt' with 'completion', and 'messages' is "
            f"there; the columns are {_listed(first)}: name yours with text_column, with "
            "prompt_column and completion_column, or with messages_column"
        )

    def check(self) -> int:
        """Reads every line, raises at the first wrong one, returns their number."""
        return sum(1 for _ in self.rows())

    def rows(self) -> Iterator[Row]:
        for number, line in _read_lines(self.path):
            where = f"{self.path}, line {number}"
            record = _parse(self.path, number, line)
            values = tuple(_value(record, column, where) for column in self.columns)
            check = _check_messages if self.kind == "chat" else _check_text
            for column, value in zip(self.columns, values, strict=True):
                check(value, f"{where}, column {column!r}")
            yield Row(number, values)


def is_stream(path: str | None, argument: str) -> bool:
    """Whether this is one text (True) or records (False); refuses any other file."""
    suffix = ".txt" if path is None else Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{argument}={path!r}: the file must be one of {', '.join(FORMATS)}")
    return suffix == ".txt"


def require_file(path: str, argument: str) -> None:
    if not Path(path).is_file():
        problem = "this is a folder" if Path(path).is_dir() else "there is no such file"
        raise ValueError(
            f"{argument}={path!r}: {problem}; give a {' or '.join(FORMATS)} file "
            f"(relative paths start at {Path.cwd()})"
        )


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Lines with their ends, counted from 1; only a line feed ends a line."""
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            body = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                text = body.decode("utf-8")
            except UnicodeDecodeError as error:
                at = len(raw) - len(body) + error.start
                raise ValueError(
                    f"{path}, line {number}: byte {at + 1} of the line (offset {offset + at} of "
                    f"the file) is not UTF-8 ({error.reason}); save the file as UTF-8"
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
    raise ValueError(
        f"{where}: no column {column!r}; the columns are {_listed(record)}{nearest(column, record)}"
    )


def _check_text(value: Any, where: str) -> None:
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
