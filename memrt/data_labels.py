"""The classes of labelled records: their names and ids, and what is no label of them.

A label is a name or a whole number. Names of a fresh head are those in the training data, numbers
in their order, else alphabetically, so that equal data gives equal ids. A head that was trained
keeps its own: labels are then its names, or its ids, and others are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memrt.data_cells import listed
from memrt.data_records import RecordFile
from memrt.errors import nearest

if TYPE_CHECKING:
    from memrt.data_settings import DataSettings

__all__ = ["Labels", "read_label_names"]


@dataclass(frozen=True, slots=True)
class Labels:
    """Names by id."""

    names: tuple[str, ...]

    @classmethod
    def of_head(cls, names: Sequence[str], found: Sequence[str], *, path: str | None) -> Labels:
        """Those of a trained head, if the labels of the training data are its names or its ids."""
        labels = cls(tuple(names))
        generic = all(name.upper() == f"LABEL_{index}" for index, name in enumerate(names))
        by_id = not set(found) <= set(names)
        if by_id and not (all(labels._is_id(text) for text in found) and (generic or "0" in found)):
            raise ValueError(
                f"{path}: the labels are {listed(found)}, and the model's head knows "
                f"{listed(names)}; rename the labels, or start from a model without a trained head"
            )
        return labels

    def id_of(self, text: str, where: str) -> int:
        """The id of a label's text."""
        if text in self.names:
            return self.names.index(text)
        if self._is_id(text):
            return int(text)
        raise ValueError(
            f"{where}: {text!r} is none of the {len(self.names)} labels {listed(self.names)}"
            f"{nearest(text, self.names)}"
        )

    def ids(self, source: RecordFile, texts: Sequence[str], lines: Sequence[int]) -> list[int]:
        """The ids of many rows."""
        column = source.columns[-1]
        return [
            self.id_of(text, f"{source.path}, {source.place} {line}, column {column!r}")
            for text, line in zip(texts, lines, strict=True)
        ]

    def check(self, source: RecordFile) -> None:
        """Reads every record, raises at the first that is wrong or has another label."""
        for row in source.rows():
            self.ids(source, [row.values[-1]], [row.line])

    def _is_id(self, text: str) -> bool:
        """Numbers are ids where no class has a number for its name."""
        named = any(name.lstrip("-").isdigit() for name in self.names)
        return not named and text.isdecimal() and int(text) < len(self.names)


def read_label_names(settings: DataSettings) -> tuple[str, ...]:
    """The names of the classes in the training data, in the order of their ids."""
    assert settings.path is not None
    assert settings.label_column is not None
    source = RecordFile.open(settings.path, settings)
    counts = Counter(row.values[-1] for row in source.rows())
    where = f"{source.path}, column {settings.label_column!r}"
    if len(counts) < 2:
        raise ValueError(f"{where}: every row has the label {listed(counts)}; classes are two")
    if len(counts) == counts.total() > 2:
        raise ValueError(
            f"{where}: each of the {len(counts)} rows has a label of its own ({listed(counts)}); "
            "name the column with the classes with label_column"
        )
    if source.classes is not None:
        return source.classes
    numbers = all(text.removeprefix("-").isdecimal() for text in counts)
    return tuple(sorted(counts, key=(lambda text: (int(text), text)) if numbers else None))
