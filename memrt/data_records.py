"""Records with named columns, checked one by one: text, prompts with completions, chats, classes.

The columns have their usual names or are named by the user; a table is opened by what its path
means (``memrt.data_files``), and what is wrong in it is named by file, line or row, and column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memrt.data_arrow import HubTable, ParquetTable
from memrt.data_cells import check_messages, check_text, label_text, listed, value_of
from memrt.data_files import is_hub_dataset
from memrt.data_tables import DelimitedTable, JsonLines, Table
from memrt.errors import nearest

if TYPE_CHECKING:
    from memrt.data_settings import DataSettings

__all__ = ["Kind", "RecordFile", "Row"]

Kind = Literal["text", "prompt_completion", "chat", "classification"]

_USUAL_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """The wanted columns of one record; ``line`` is its row where the source has no lines."""

    line: int
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFile:
    """A table whose ``columns`` hold what ``kind`` needs; of classes the label comes last."""

    path: str
    kind: Kind
    columns: tuple[str, ...]
    table: Table
    classes: tuple[str, ...] | None = None
    """Names that the table itself has for the numbers in its label column."""

    @property
    def name(self) -> str:
        return self.path

    @property
    def place(self) -> str:
        """What a row's number counts: "line" or "row"."""
        return self.table.place

    @classmethod
    def open(cls, path: str, settings: DataSettings) -> RecordFile:
        """With the columns that the user named, or those that the first record has."""
        table = _table(path, settings)
        names = table.column_names()
        named = settings.named_columns()
        if not named:
            kind = _usual_kind(path, table, names)
            return cls(path=path, kind=kind, columns=_USUAL_COLUMNS[kind], table=table)
        [(kind, columns)] = named.items()
        if table.fixed_columns:
            _require_columns(table, names, columns, settings)
        classes = table.class_names(columns[-1]) if kind == "classification" else None
        return cls(path=path, kind=kind, columns=columns, table=table, classes=classes)

    def check(self) -> int:
        """Reads every record, raises at the first wrong one, returns their number."""
        return sum(1 for _ in self.rows())

    def rows(self) -> Iterator[Row]:
        """The wanted columns of every record."""
        for number, record in self.table.records(self.columns):
            where = f"{self.path}, {self.place} {number}"
            values = [value_of(record, column, where) for column in self.columns]
            for index, (column, value) in enumerate(zip(self.columns, values, strict=True)):
                here = f"{where}, column {column!r}"
                if self.kind == "chat":
                    check_messages(value, here)
                elif self.kind == "classification" and index == len(values) - 1:
                    values[index] = self._label(value, here)
                else:
                    check_text(value, here)
            yield Row(number, tuple(values))

    def _label(self, value: Any, where: str) -> str:
        text = label_text(value, where)
        if self.classes is None:
            return text
        if not text.isdecimal() or int(text) >= len(self.classes):  # -1 stands for none
            raise ValueError(f"{where}: {text} is no label; those are {listed(self.classes)}")
        return self.classes[int(text)]


def _table(path: str, settings: DataSettings) -> Table:
    if is_hub_dataset(path):
        return HubTable(name=path, configuration=settings.configuration)
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return ParquetTable(name=path)
    if suffix == ".jsonl":
        return JsonLines(name=path)
    return DelimitedTable(
        name=path,
        delimiter="," if suffix == ".csv" else "\t",
        quoting=suffix == ".csv" if settings.quoting == "auto" else settings.quoting,
        header=None if settings.columns is None else tuple(settings.columns),
    )


def _first(table: Table) -> str:
    """Where the names of the columns stand."""
    return f"{table.name}, line 1" if table.place == "line" else table.name


def _usual_kind(path: str, table: Table, names: list[str]) -> Kind:
    found = [kind for kind, usual in _USUAL_COLUMNS.items() if set(names) >= set(usual)]
    if len(found) == 1:
        return found[0]
    problem = "more than one" if found else "none"
    raise ValueError(
        f"{_first(table)}: {problem} of 'text', 'prompt' with 'completion', and 'messages' is "
        f"there; the columns are {listed(names)}: name yours with text_column, with "
        f"prompt_column and completion_column, or with messages_column{_header_hint(table, names)}"
    )


def _require_columns(
    table: Table, names: list[str], columns: tuple[str, ...], settings: DataSettings
) -> None:
    for column in columns:
        if column not in names:
            remedy = nearest(column, names)
            if not remedy and column == "text" and settings.text_column is None:
                remedy = "; name yours with text_column"
            raise ValueError(
                f"{_first(table)}: no column {column!r}; the columns are {listed(names)}{remedy}"
                f"{_header_hint(table, names)}"
            )


def _header_hint(table: Table, names: list[str]) -> str:
    """What else may be meant, where line 1 was taken for a header."""
    if not isinstance(table, DelimitedTable) or table.header is not None:
        return ""
    if table.delimiter == "," and len(names) == 1 and ";" in names[0]:
        return " (cells of a .csv are separated by commas, and this line has semicolons)"
    return "; where line 1 is no header, name the columns with columns"
