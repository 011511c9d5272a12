"""Records of a ``.jsonl``, ``.csv`` or ``.tsv`` file, one at a time, each with its line number.

Lines are parsed here and not by Arrow's or pandas' readers: those know no line numbers, refuse
unused columns of mixed type, turn text that looks like a date or a number into one, and an open
quote silently eats the lines that follow it. One record is in memory at a time.

``.csv`` is RFC 4180: commas, quotes around cells that hold a comma, a quote (doubled) or a line
feed. ``.tsv`` has no quotes: a line is a record, and what stands between two tabs is the cell.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from memrt.data_cells import listed

__all__ = ["DelimitedTable", "JsonLines", "Record", "Table", "read_lines"]

Record = tuple[int, Mapping[str, Any]]

# An open quote takes all that follows as its cell; beyond this the file is not read on.
_LONGEST_CELL = 2**24


class Table(Protocol):
    """Named columns, read record by record."""

    @property
    def name(self) -> str:
        """The file, or the dataset."""

    @property
    def place(self) -> Literal["line", "row"]:
        """What the number of a record counts, from 1."""

    @property
    def fixed_columns(self) -> bool:
        """Whether every record has the same columns."""

    def column_names(self) -> list[str]:
        """Those of the first record; `ValueError` where there is no record."""

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        """All records, with at least ``columns``."""

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names of the classes that the numbers in a column stand for, where the file says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLines:
    """A ``.jsonl`` file: one object a line."""

    name: str
    place: Literal["line"] = "line"
    fixed_columns: bool = False

    def column_names(self) -> list[str]:
        """The first line's keys."""
        for _, record in self.records(()):
            return list(record)
        raise ValueError(f"{self.name}: the file is empty; it must hold one JSON object a line")

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        """Every line; other columns may hold anything."""
        for number, line in read_lines(self.name):
            yield number, _parse(self.name, number, line)

    def class_names(self, column: str) -> None:
        """JSON says nothing about numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DelimitedTable:
    """A ``.csv`` or ``.tsv`` file. ``header``: the columns' names where line 1 is data already."""

    name: str
    delimiter: str
    quoting: bool
    header: tuple[str, ...] | None = None
    place: Literal["line"] = "line"
    fixed_columns: bool = True

    def column_names(self) -> list[str]:
        """The header's, or those that were given."""
        lines = self._cells()
        number, first = next(lines, (0, []))
        if self.header is None:
            self._check_header(number, first)
            if next(lines, None) is None:
                raise ValueError(f"{self.name}: no record follows the header in line {number}")
            return first
        if not first:
            raise ValueError(f"{self.name}: the file is empty")
        if [cell.strip() for cell in first] == list(self.header):
            raise ValueError(
                f"{self.name}, line {number}: columns={list(self.header)!r} are given, and this "
                "line is a header with the same names; leave columns out"
            )
        return list(self.header)

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        """Every record; one with more or fewer cells than the header is an error."""
        lines = self._cells()
        names, said = self.header, "columns names"
        if names is None:
            names, said = tuple(next(lines, (0, []))[1]), "the header names"
        for number, cells in lines:
            if len(cells) != len(names):
                raise ValueError(
                    f"{self.name}, line {number}: {len(cells)} cells, and {said} {len(names)} "
                    f"({listed(names)})"
                )
            yield number, dict(zip(names, cells, strict=True))

    def class_names(self, column: str) -> None:
        """Text alone."""

    def _check_header(self, number: int, names: list[str]) -> None:
        if not names:
            raise ValueError(
                f"{self.name}: the file is empty; line 1 must name the columns (or name them with "
                "columns)"
            )
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f"{self.name}, line {number}: the header names {listed(twice)} more than once; "
                "where line 1 is no header, name the columns with columns"
            )

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        """The cells of every record with the line that it begins in."""
        records = self._quoted() if self.quoting else self._unquoted()
        for number, cells in records:
            if not cells:
                raise ValueError(
                    f"{self.name}, line {number}: the line is empty; every line must be a record"
                )
            yield number, cells

    def _unquoted(self) -> Iterator[tuple[int, list[str]]]:
        for number, line in read_lines(self.name):
            text = line.removesuffix("\n").removesuffix("\r")
            yield number, text.split(self.delimiter) if text.strip() else []

    def _quoted(self) -> Iterator[tuple[int, list[str]]]:
        lines = (line for _, line in read_lines(self.name))
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                cells = _next_record(reader)
            except csv.Error as error:
                raise ValueError(self._malformed(number, reader.line_num, error)) from error
            if cells is None:
                return
            yield number, cells if any(cell.strip() for cell in cells) or len(cells) > 1 else []

    def _malformed(self, first: int, last: int, error: csv.Error) -> str:
        text = str(error)
        if "field larger" in text:
            text = f"a cell has more than {_LONGEST_CELL:,} characters"
        if "unexpected end" in text:
            text = "the file ends inside a quoted cell"
        where = f"line {first}" if last <= first else f"line {first} (read on to line {last})"
        return (
            f"{self.name}, {where}: malformed: {text}; a quote inside a quoted cell is written "
            "twice, and where quotes mean nothing, set quoting=False"
        )


def _next_record(reader: Any) -> list[str] | None:
    """The next record; the module's limit, which is everybody's, is widened for this long."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        cells: list[str] | None = next(reader, None)
    finally:
        csv.field_size_limit(before)
    return cells


def read_lines(path: str) -> Iterator[tuple[int, str]]:
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
        text = json.dumps(record)
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise ValueError(f"{where}: must be a JSON object with named columns, not {shown}")
    return record
