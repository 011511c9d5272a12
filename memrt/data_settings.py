"""``DataSettings``: what to read and how to bring it to length, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from memrt.data_files import SOURCES, is_hub_dataset, is_stream
from memrt.data_records import Kind

__all__ = ["DataSettings", "Truncation", "check_integer"]

Truncation = Literal["error", "cut", "drop"]

_TRUNCATIONS = ("error", "cut", "drop")
_COLUMNS = (
    "text_column",
    "prompt_column",
    "completion_column",
    "messages_column",
    "label_column",
    "text_pair_column",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """What to read and how to bring it to length.

    ``path``: a ``.txt``, ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file, or a dataset of the
    Hub, ``owner/name`` or ``owner/name:split`` (the split is "train" where none is named); None is
    the embedded text.
    ``packing``: "auto" packs text, and packs neither prompt/completion nor chat. The summary says
    what it came to.
    ``truncation``: for examples longer than ``sequence_length`` that are not packed. "error" (also
    when None) refuses the data, "cut" keeps their beginning, "drop" leaves them out.
    ``*_column``: the names of the columns; None takes text, prompt and completion, or messages.
    ``label_column`` makes classes of the records: the text, with ``text_pair_column`` two texts,
    and the label, a name or a whole number.
    ``columns``: names of all columns of a ``.csv`` or ``.tsv`` whose line 1 is data already.
    ``quoting``: whether quotes enclose cells; "auto" for ``.csv``, and not for ``.tsv``.
    ``configuration``: of a dataset of the Hub that has several.
    ``separator``: goes between prompt and completion, as a part of the prompt.
    ``evaluation_fraction``: the part held out, chosen by ``seed``: whole records, or blocks of a
    text.
    """

    path: str | None = None
    sequence_length: int = 256
    packing: bool | Literal["auto"] = "auto"
    truncation: Truncation | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    label_column: str | None = None
    text_pair_column: str | None = None
    columns: list[str] | None = None
    quoting: bool | Literal["auto"] = "auto"
    configuration: str | None = None
    separator: str = ""
    evaluation_path: str | None = None
    evaluation_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_values()
        self._check_column_names()
        self._check_combinations()

    def paths(self) -> list[tuple[str, str | None]]:
        """``(argument, path)`` of the files to read; None is the embedded text."""
        paths = [("path", self.path)]
        if self.evaluation_path is not None:
            paths.append(("evaluation_path", self.evaluation_path))
        return paths

    def named_columns(self) -> dict[Kind, tuple[str, ...]]:
        """The columns that the user named, at most one entry."""
        named: dict[Kind, tuple[str, ...]] = {}
        if self.label_column is not None:
            pair = () if self.text_pair_column is None else (self.text_pair_column,)
            named["classification"] = (self.text_column or "text", *pair, self.label_column)
        elif self.text_column is not None:
            named["text"] = (self.text_column,)
        if self.prompt_column is not None and self.completion_column is not None:
            named["prompt_completion"] = (self.prompt_column, self.completion_column)
        if self.messages_column is not None:
            named["chat"] = (self.messages_column,)
        return named

    def _check_values(self) -> None:
        for name in ("path", "evaluation_path"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a string or None")
        check_integer("sequence_length", self.sequence_length, smallest=2)
        check_integer("seed", self.seed, smallest=0)
        if not isinstance(self.packing, bool) and self.packing != "auto":
            raise ValueError(f"packing={self.packing!r}: must be True, False or 'auto'")
        if not isinstance(self.quoting, bool) and self.quoting != "auto":
            raise ValueError(f"quoting={self.quoting!r}: must be True, False or 'auto'")
        if self.truncation is not None and self.truncation not in _TRUNCATIONS:
            raise ValueError(
                f"truncation={self.truncation!r}: must be one of {', '.join(_TRUNCATIONS)}"
            )
        if not isinstance(self.separator, str):
            raise ValueError(f"separator={self.separator!r}: must be a string")
        fraction: Any = self.evaluation_fraction
        is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if not is_number or not 0 <= fraction < 1:
            raise ValueError(
                f"evaluation_fraction={fraction!r}: must be a number from 0 to below 1"
            )

    def _check_column_names(self) -> None:
        for name in (*_COLUMNS, "configuration"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                what = "the name of a column" if name in _COLUMNS else "a name"
                raise ValueError(f"{name}={value!r}: must be {what}, or None")
        names = self.columns
        if names is not None:
            if not isinstance(names, list | tuple) or not names:
                raise ValueError(f"columns={names!r}: must be a list of names, or None")
            if not all(isinstance(name, str) and name for name in names):
                raise ValueError(f"columns={names!r}: every name must be text")
            if len(set(names)) < len(names):
                raise ValueError(f"columns={names!r}: a name comes twice")
        if self.text_pair_column is not None and self.label_column is None:
            raise ValueError(
                f"text_pair_column={self.text_pair_column!r}: two texts go with a label; name it "
                "with label_column"
            )
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError(
                f"prompt_column={self.prompt_column!r} and "
                f"completion_column={self.completion_column!r}: "
                "a prompt and its completion come together; name both"
            )
        if self.prompt_column is not None and self.prompt_column == self.completion_column:
            raise ValueError(
                f"prompt_column and completion_column are both {self.prompt_column!r}: "
                "name two columns, or use text_column"
            )
        named = self.named_columns()
        if any(len(set(each)) < len(each) for each in named.values()):
            raise ValueError(f"columns are named twice in {', '.join(*named.values())}")
        if len(named) > 1:
            raise ValueError(
                f"columns are named for {' and '.join(named)}: an example is one of these; "
                "name only its columns"
            )

    def _check_combinations(self) -> None:
        if self.evaluation_path is not None and self.evaluation_fraction:
            raise ValueError(
                f"evaluation_path={self.evaluation_path!r} and "
                f"evaluation_fraction={self.evaluation_fraction}: "
                "both name evaluation data; give one of them"
            )
        streams = [name for name, path in self.paths() if is_stream(path, name)]
        if streams and self.packing is False:
            raise ValueError(
                f"packing=False: {streams[0]}={getattr(self, streams[0])!r} is one text stream and "
                "always packed; leave packing out, or give a file with one example a record"
            )
        if self.label_column is not None:
            self._check_classes(streams)
        if self.named_columns() and len(streams) == len(self.paths()):
            raise ValueError(
                f"columns are named, but path={self.path!r} is a text without columns; "
                f"leave them out, or give {SOURCES}"
            )
        self._check_formats()

    def _check_classes(self, streams: list[str]) -> None:
        if self.packing is True:
            raise ValueError("packing=True: records with labels are never packed; leave it out")
        if streams:
            raise ValueError(
                f"label_column={self.label_column!r}: {streams[0]}="
                f"{getattr(self, streams[0])!r} is a text without columns; give {SOURCES}"
            )

    def _check_formats(self) -> None:
        paths = [path for _, path in self.paths() if path is not None]
        tables = [path for path in paths if path.lower().endswith((".csv", ".tsv"))]
        if self.columns is not None and not tables:
            raise ValueError(f"columns={self.columns!r} has no effect without a .csv or .tsv file")
        if self.quoting != "auto" and not tables:
            raise ValueError(f"quoting={self.quoting!r} has no effect without a .csv or .tsv file")
        if self.configuration is not None and not any(map(is_hub_dataset, paths)):
            raise ValueError(
                f"configuration={self.configuration!r} has no effect without a dataset of the Hub"
            )


def check_integer(name: str, value: Any, *, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {smallest}")
