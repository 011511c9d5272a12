"""Reports for people, from the JSON alone: Markdown, a terminal with colour, plain text.

A report is turned into sections (`memrt.profiling.render_sections`), and sections into text. Byte
columns of a table share one unit, named beside it: KiB, MiB from 10 MiB on, GiB from 10 GiB on. On
a terminal tables are rich's; anywhere else (a file, a pipe) the text is aligned Markdown without
colour, so that it can be pasted.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

__all__ = [
    "Column",
    "Section",
    "Table",
    "print_report",
    "print_sections",
    "sections_to_markdown",
    "to_markdown",
    "unit_of",
]

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MISSING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column: its heading, a shorter one for narrow terminals, and how its values are shown.

    kind: "text", "bytes" (in the table's unit), "count" (whole, with separators) or "loss".
    """

    title: str
    short: str | None = None
    kind: str = "text"
    optional: bool = False
    """Left out where a terminal is too narrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of values; None is shown as a dash."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    unit: str | None = None

    def cells(self) -> list[list[str]]:
        """Every value as text."""
        return [
            [self._cell(value, column) for value, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]

    def _cell(self, value: Any, column: Column) -> str:
        if value is None:
            return MISSING
        if isinstance(value, str) or column.kind == "text":
            return str(value)
        if column.kind == "bytes":
            assert self.unit is not None
            return f"{value / _UNITS[self.unit]:,.1f}"
        if column.kind == "count":
            return f"{value:,.0f}"
        assert column.kind == "loss", column.kind
        return f"{value:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, text above and below, and a table between."""

    title: str = ""
    before: Sequence[str] = ()
    table: Table | None = None
    after: Sequence[str] = ()
    file_only: bool = False
    """Too much for a terminal; in the Markdown file."""


def unit_of(rows: Sequence[Sequence[Any]]) -> str:
    """The unit for a table's bytes: the largest that shows its largest number as 10 or more."""
    largest = max((abs(v) for row in rows for v in row if isinstance(v, int)), default=0)
    fitting = [unit for unit, size in _UNITS.items() if largest >= 10 * size]
    return fitting[-1] if fitting else "KiB"


# ---------------------------------------------------------------- Markdown


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown_table(table: Table) -> str:
    titles = [_escaped(column.title) for column in table.columns]
    rows = [[_escaped(cell) for cell in row] for row in table.cells()]
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows, strict=True)]
    right = [column.kind != "text" for column in table.columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * (width + 1) + ":" if is_right else "-" * (width + 2)
        for width, is_right in zip(widths, right, strict=True)
    ]
    return "\n".join([line(titles), "|" + "|".join(rule) + "|", *(line(row) for row in rows)])


def _section_text(section: Section, *, heading: str) -> str:
    parts = [f"{heading} {section.title}".strip()] if section.title else []
    parts += section.before
    if section.table is not None:
        parts.append(_markdown_table(section.table))
    parts += section.after
    return "\n\n".join(parts)


def to_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as a Markdown page."""
    from memrt.profiling.render_sections import sections

    return sections_to_markdown(sections(report))


def sections_to_markdown(shown: Sequence[Section]) -> str:
    """Sections as a Markdown page, the first of them its title."""
    texts = [
        _section_text(section, heading="##" if index else "#")
        for index, section in enumerate(shown)
    ]
    return "\n\n".join(texts) + "\n"


# ---------------------------------------------------------------- terminal


def print_report(report: Mapping[str, Any], file: TextIO | None = None) -> None:
    """To a terminal with rich; to anything else as plain text."""
    from memrt.profiling.render_sections import sections

    print_sections([section for section in sections(report) if not section.file_only], file)


def print_sections(shown: Sequence[Section], file: TextIO | None = None) -> None:
    """To a terminal with rich; to anything else as plain text."""
    stream = sys.stdout if file is None else file
    if stream.isatty():
        _print_rich(shown, stream)
    else:
        stream.write(sections_to_markdown(shown))


def _print_rich(shown: Sequence[Section], stream: TextIO) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    for section in shown:
        if section.title:
            console.print(Text(section.title, style="bold"))
        for text in section.before:
            console.print(Text(text))
        if section.table is not None:
            console.print(Padding(_rich_table(section.table, console.width), (0, 0, 1, 0)))
        for text in section.after:
            console.print(Text(text, style="dim"))
        console.print()


def _heading(column: Column, short: bool) -> str:
    return column.short if short and column.short else column.title


def _needed_width(table: Table, columns: Sequence[int], short: bool) -> int:
    """Width of a table whose first column may wrap down to 24 characters."""
    cells = table.cells()
    width = 0
    for position, index in enumerate(columns):
        title = _heading(table.columns[index], short)
        widest = max([len(title), *(len(row[index]) for row in cells)])
        width += min(widest, 24) if position == 0 else widest
    return width + (1 if short else 2) * len(columns)


def _rich_table(table: Table, width: int) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    everything = list(range(len(table.columns)))
    needed = [i for i in everything if not table.columns[i].optional]
    choices = [(everything, False), (everything, True), (needed, False), (needed, True)]
    fitting = [choice for choice in choices if _needed_width(table, *choice) <= width]
    shown, short = (fitting or choices[-1:])[0]
    padding = (0, 0) if short else (0, 1, 0, 0)
    rich_table = RichTable(box=SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False)
    for index in shown:
        column = table.columns[index]
        is_text = column.kind == "text"
        rich_table.add_column(
            _heading(column, short),
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=not is_text,
        )
    for row in table.cells():
        row[0] = row[0].replace("+", " + ")  # a stack wraps at its pluses
        rich_table.add_row(*(Text(row[index]) for index in shown))
    return rich_table
