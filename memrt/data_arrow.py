"""Records of a ``.parquet`` file or of a dataset on the Hub, batch by batch, with row numbers.

Of a parquet file only the wanted columns are read, one batch of rows at a time; a dataset of the
Hub is downloaded once into the cache of ``datasets`` and read from there, mapped and not loaded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memrt.data_files import HUB_DATASET
from memrt.data_tables import Record
from memrt.model_source import hub_answers

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, Features

__all__ = ["HubTable", "ParquetTable"]

_DEFAULT_SPLIT = "train"
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetTable:
    """A ``.parquet`` file."""

    name: str
    place: Literal["row"] = "row"
    fixed_columns: bool = True

    def column_names(self) -> list[str]:
        """Those of the file's schema."""
        with _parquet(self.name) as file:
            if file.metadata.num_rows == 0:
                raise ValueError(f"{self.name}: the file has no rows")
            names: list[str] = file.schema_arrow.names
        return names

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        """Every row."""
        with _parquet(self.name) as file:
            names: list[str] = file.schema_arrow.names
            for column in columns:
                if names.count(column) > 1:
                    raise ValueError(
                        f"{self.name}: {names.count(column)} columns are called {column!r}; "
                        "rename all but one"
                    )
            batches = file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=list(columns))
            yield from _rows(batches, columns, self.name)

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Where ``datasets`` wrote the file, and with classes."""
        from datasets import Features

        with _parquet(self.name) as file:
            schema = file.schema_arrow
            if b"huggingface" not in (schema.metadata or {}):
                return None
            return _class_names(Features.from_arrow_schema(schema), column)


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """An open file; what pyarrow raises while it is read, on one line with the file's name."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a readable parquet file ({text})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTable:
    """A dataset of the Hub: ``owner/name`` or ``owner/name:split``."""

    name: str
    configuration: str | None = None
    place: Literal["row"] = "row"
    fixed_columns: bool = True

    @property
    def dataset(self) -> Dataset:
        """The split, downloaded if it was not; `ValueError` on one line where it cannot be had."""
        return _hub_dataset(self.name, self.configuration)

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether it is the same data: rows, and what the files of its cache hold."""
        digests = []
        for cached in self.dataset.cache_files:
            with Path(cached["filename"]).open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return {"rows": len(self.dataset), "sha256": digests}

    def column_names(self) -> list[str]:
        """Those of the dataset."""
        if len(self.dataset) == 0:
            raise ValueError(f"{self.name}: the split has no rows")
        names: list[str] = self.dataset.column_names
        return names

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        """Every row."""
        wanted = self.dataset.select_columns(list(dict.fromkeys(columns)))
        tables = wanted.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH)
        batches = (batch for table in tables for batch in table.to_batches())
        yield from _rows(batches, columns, self.name)

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Where the dataset names its classes."""
        return _class_names(self.dataset.features, column)


@lru_cache(maxsize=4)
def _hub_dataset(path: str, configuration: str | None) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    found = HUB_DATASET.fullmatch(path)
    assert found is not None, path
    name, split = found["name"], found["split"] or _DEFAULT_SPLIT
    reachable = hub_answers()
    try:
        with _quiet():
            if reachable:
                return datasets.load_dataset(name, configuration, split=split)
            return _cached_builder(name, configuration).as_dataset(split=split)
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        network = "" if reachable else " (and the Hub does not answer: its cache was asked)"
        raise ValueError(
            f"{path!r} is neither a file nor a dataset that can be had from the Hub{network}: "
            f"{text}; check the name, its split (owner/name:split) and configuration, and the "
            "network"
        ) from error


def _cached_builder(name: str, configuration: str | None) -> Any:
    """Without network: the client would try again and again for a minute before it looks there."""
    from datasets.packaged_modules.cache.cache import Cache

    builder = Cache(
        repo_id=name,
        dataset_name=name.partition("/")[2],
        config_name=configuration,
        version="auto",
        hash="auto",
    )
    builder.download_and_prepare()
    return builder


@contextmanager
def _quiet() -> Iterator[None]:
    """What fails in the end is raised; until then the Hub's clients say nothing."""
    from datasets.utils.logging import get_verbosity, set_verbosity
    from huggingface_hub.utils import logging as hub_logging

    levels = get_verbosity(), hub_logging.get_verbosity()
    set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])


def _rows(
    batches: Iterator[pyarrow.RecordBatch], columns: Sequence[str], name: str
) -> Iterator[Record]:
    number = 0
    for batch in batches:
        cells = {column: _values(batch.column(column), column, name, number) for column in columns}
        for index in range(batch.num_rows):
            number += 1
            record: Mapping[str, Any] = {column: cells[column][index] for column in columns}
            yield number, record


def _values(array: Any, column: str, name: str, before: int) -> list[Any]:
    try:
        found: list[Any] = array.to_pylist()
    except UnicodeDecodeError:
        found = []
        for index, scalar in enumerate(array, start=1):
            try:
                found.append(scalar.as_py())
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{name}, row {before + index}, column {column!r}: byte {error.start + 1} is "
                    f"not UTF-8 ({error.reason})"
                ) from error
    return found


def _class_names(features: Features, column: str) -> tuple[str, ...] | None:
    from datasets import ClassLabel

    feature = features.get(column)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None
