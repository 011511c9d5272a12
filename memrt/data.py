"""Training data: the embedded text, files and datasets of the Hub, as ``Dataset``; batches.

An example is ``input_ids``, ``attention_mask`` and ``labels``, each ``[tokens]``; prompts and all
chat turns but the assistant's carry the label -100. The steps have a module each:
``data_settings`` (what is asked), ``data_files`` and ``data_records`` (reading, with line numbers
in errors), ``tokenization`` (ids and labels), ``packing`` (length); here they are put together. All
that was cut, dropped or left over is counted in ``PreparedData.summary``.

Examples are held in host memory at 9 bytes a token (int32 ids and labels, int8 mask), about twice
that while they are made; nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from memrt.class_examples import ClassExample, encode_classes
from memrt.collator import Collator
from memrt.data_files import TextStream, is_stream, require_file
from memrt.data_labels import Labels, read_label_names
from memrt.data_records import RecordFile, Row
from memrt.data_settings import DataSettings
from memrt.packing import (
    Example,
    Source,
    SplitSummary,
    arrange,
    is_packed,
    num_tokens,
    pack,
    require_fit,
    split,
)
from memrt.tokenization import (
    Encoded,
    byte_level_tokenizer,
    embedded_text,
    encode_chat,
    encode_documents,
    encode_pairs,
    encode_stream,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Collator",
    "DataSettings",
    "DataSummary",
    "Labels",
    "PreparedData",
    "SplitSummary",
    "byte_level_tokenizer",
    "embedded_text",
    "load_examples",
    "read_label_names",
]

_ROWS_PER_CALL = 512
_EXAMPLES_PER_SHARD = 4096
_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "attention_mask": datasets.List(datasets.Value("int8")),
        "labels": datasets.List(datasets.Value("int32")),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """The counts of both splits, for the report."""

    sequence_length: int
    train: SplitSummary
    evaluation: SplitSummary | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Columns ``input_ids``, ``attention_mask``, ``labels`` in both datasets.

    Of classes a label is an id, ``label_names`` has its name, and pairs that a tokenizer tells
    apart have ``token_type_ids``.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    summary: DataSummary
    label_names: tuple[str, ...] | None = None


def load_examples(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, labels: Labels | None = None
) -> PreparedData:
    """Reads, checks, tokenises and splits; same settings, files and tokenizer, same datasets.

    Every record of every file is checked before the first is tokenised. ``labels``: of a
    classifier; None takes those of the training data.
    """
    if settings.label_column is not None:
        labels = labels or Labels(read_label_names(settings))
    elif labels is not None:
        raise ValueError("labels were given and label_column=None: name the column with them")
    sources = [_open(name, path, settings, labels) for name, path in settings.paths()]
    _refuse_settings_without_effect(settings, sources)
    parts = [list(_encode(source, settings, tokenizer, labels)) for source in sources]
    for source, part in zip(sources, parts, strict=True):
        require_fit(part, source, settings)
    if settings.evaluation_fraction:
        arranged = _split_and_arrange(parts[0], sources[0], settings)
    else:
        arranged = [arrange(p, s, settings) for p, s in zip(parts, sources, strict=True)]
    splits = [_dataset(examples) for examples, _ in arranged]
    counts = [summary for _, summary in arranged]
    return PreparedData(
        train=splits[0],
        evaluation=splits[1] if len(splits) > 1 else None,
        summary=DataSummary(
            sequence_length=settings.sequence_length,
            train=counts[0],
            evaluation=counts[1] if len(counts) > 1 else None,
        ),
        label_names=None if labels is None else labels.names,
    )


def _open(argument: str, path: str | None, settings: DataSettings, labels: Labels | None) -> Source:
    source: Source
    if path is not None:
        require_file(path, argument)
    if path is None or is_stream(path, argument):
        source = TextStream(path=path)
    else:
        source = RecordFile.open(path, settings)
        if labels is not None:
            labels.check(source)
            return source
    source.check()
    return source


def _refuse_settings_without_effect(settings: DataSettings, sources: Sequence[Source]) -> None:
    if settings.truncation is not None and all(is_packed(s, settings) for s in sources):
        raise ValueError(
            f"truncation={settings.truncation!r} has no effect on packed data "
            f"({sources[0].name}): leave it out, or give records and packing=False"
        )
    if settings.separator and all(s.kind != "prompt_completion" for s in sources):
        raise ValueError(
            f"separator={settings.separator!r} has no effect on {sources[0].kind} data "
            f"({sources[0].name}): it goes between prompt and completion; leave it out"
        )


def _split_and_arrange(
    examples: Sequence[Example], source: Source, settings: DataSettings
) -> list[tuple[list[Example], SplitSummary]]:
    """A text is split by blocks, everything else by documents, so that no document is in both."""
    num_leftover_tokens = 0
    if isinstance(source, TextStream):
        texts = [example for example in examples if isinstance(example, Encoded)]
        blocks = list(pack(texts, settings.sequence_length))
        num_leftover_tokens = num_tokens(examples) - num_tokens(blocks)
        examples = blocks
    train_part, evaluation_part = split(examples, source, settings)
    train, summary = arrange(train_part, source, settings, part="train")
    num_leftover_tokens += summary.num_leftover_tokens
    return [
        (train, replace(summary, num_leftover_tokens=num_leftover_tokens)),
        arrange(evaluation_part, source, settings, part="evaluation"),
    ]


def _encode(
    source: Source,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels | None,
) -> Iterator[Example]:
    if isinstance(source, TextStream):
        yield from encode_stream(tokenizer, source.pieces())
        return
    rows = source.rows()
    while batch := list(islice(rows, _ROWS_PER_CALL)):
        for example in _encode_rows(source, batch, settings, tokenizer, labels):
            if not example.is_trainable:
                raise ValueError(
                    f"{source.path}, {source.place} {example.line}: no token to train on is left "
                    "after tokenisation"
                )
            yield example


def _encode_rows(
    source: RecordFile,
    rows: Sequence[Row],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels | None,
) -> Iterator[Example]:
    lines = [row.line for row in rows]
    if source.kind == "text":
        yield from encode_documents(tokenizer, [row.values[0] for row in rows], lines)
    elif source.kind == "prompt_completion":
        prompts = [row.values[0] + settings.separator for row in rows]
        yield from encode_pairs(tokenizer, prompts, [row.values[1] for row in rows], lines)
    elif labels is not None:
        yield from encode_classes(
            tokenizer,
            [row.values[:-1] for row in rows],
            labels.ids(source, [row.values[-1] for row in rows], lines),
            lines,
            cut_to=settings.sequence_length if settings.truncation == "cut" else None,
        )
    else:
        from jinja2 import TemplateError

        for row in rows:
            where = f"{source.path}, {source.place} {row.line}"
            try:
                yield encode_chat(tokenizer, row.values[0], row.line)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            except TemplateError as error:
                raise ValueError(
                    f"{where}: the chat template refuses the messages: {error}"
                ) from error


def _dataset(examples: Sequence[Example]) -> datasets.Dataset:
    """Shard by shard in memory: no cache in the user's folder, no progress bar."""
    features = dict(_FEATURES)
    if isinstance(examples[0], ClassExample):
        features["labels"] = datasets.Value("int64")
        # models take none for all zero
        if any(isinstance(e, ClassExample) and e.type_ids.any() for e in examples):
            features["token_type_ids"] = datasets.List(datasets.Value("int8"))
    shards = []
    for start in range(0, len(examples), _EXAMPLES_PER_SHARD):
        shard = examples[start : start + _EXAMPLES_PER_SHARD]
        columns = {name: [_value(each, name) for each in shard] for name in features}
        shards.append(datasets.Dataset.from_dict(columns, features=datasets.Features(features)))
    return datasets.concatenate_datasets(shards)


def _value(example: Example, name: str) -> Any:
    if name == "attention_mask":
        return np.ones(len(example), dtype=np.int8)
    if name == "input_ids":
        return example.input_ids
    if isinstance(example, ClassExample):
        return example.label if name == "labels" else example.type_ids
    return example.labels
