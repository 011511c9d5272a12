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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import Tensor

from memrt.data_files import TextStream, is_stream, require_file
from memrt.data_records import RecordFile, Row
from memrt.data_settings import DataSettings, check_integer
from memrt.packing import (
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
    IGNORED_LABEL,
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
    "PreparedData",
    "SplitSummary",
    "byte_level_tokenizer",
    "embedded_text",
    "load_examples",
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
    """Columns ``input_ids``, ``attention_mask``, ``labels`` in both datasets."""

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    summary: DataSummary


def load_examples(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Reads, checks, tokenises and splits; same settings, files and tokenizer, same datasets.

    Every line of every file is checked before the first is tokenised.
    """
    sources = [_open(name, path, settings) for name, path in settings.paths()]
    _refuse_settings_without_effect(settings, sources)
    parts = [list(_encode(source, settings, tokenizer)) for source in sources]
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
    )


def _open(argument: str, path: str | None, settings: DataSettings) -> Source:
    source: Source
    if path is not None:
        require_file(path, argument)
    if path is None or is_stream(path, argument):
        source = TextStream(path=path)
    else:
        source = RecordFile.open(path, settings)
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
    examples: Sequence[Encoded], source: Source, settings: DataSettings
) -> list[tuple[list[Encoded], SplitSummary]]:
    """A text is split by blocks, everything else by documents, so that no document is in both."""
    num_leftover_tokens = 0
    if isinstance(source, TextStream):
        blocks = list(pack(examples, settings.sequence_length))
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
    source: Source, settings: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Encoded]:
    if isinstance(source, TextStream):
        yield from encode_stream(tokenizer, source.pieces())
        return
    rows = source.rows()
    while batch := list(islice(rows, _ROWS_PER_CALL)):
        for example in _encode_rows(source, batch, settings, tokenizer):
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
) -> Iterator[Encoded]:
    lines = [row.line for row in rows]
    if source.kind == "text":
        yield from encode_documents(tokenizer, [row.values[0] for row in rows], lines)
    elif source.kind == "prompt_completion":
        prompts = [row.values[0] + settings.separator for row in rows]
        yield from encode_pairs(tokenizer, prompts, [row.values[1] for row in rows], lines)
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


def _dataset(examples: Sequence[Encoded]) -> datasets.Dataset:
    """Shard by shard in memory: no cache in the user's folder, no progress bar."""
    shards = []
    for start in range(0, len(examples), _EXAMPLES_PER_SHARD):
        shard = examples[start : start + _EXAMPLES_PER_SHARD]
        columns = {
            "input_ids": [example.input_ids for example in shard],
            "attention_mask": [np.ones(len(example), dtype=np.int8) for example in shard],
            "labels": [example.labels for example in shard],
        }
        shards.append(datasets.Dataset.from_dict(columns, features=_FEATURES))
    return datasets.concatenate_datasets(shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Pads a batch on the right to its longest example, or to ``length``; int64 tensors."""

    pad_token_id: int
    length: int | None = None

    def __post_init__(self) -> None:
        check_integer("pad_token_id", self.pad_token_id, smallest=0)
        if self.length is not None:
            check_integer("length", self.length, smallest=1)

    @classmethod
    def for_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, *, length: int | None = None
    ) -> Collator:
        """Pads with the pad token, else with EOS: attention and loss skip it either way."""
        for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if token_id is not None:
                return cls(pad_token_id=int(token_id), length=length)
        raise ValueError(
            "tokenizer.pad_token=None and tokenizer.eos_token=None: batches are padded with one "
            "of them; set tokenizer.pad_token"
        )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not features:
            raise ValueError("features=[]: a batch needs at least one example")
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        missing = [name for name in fills if any(name not in feature for feature in features)]
        if missing:
            raise ValueError(
                f"features: an example has no {', '.join(missing)}; load_examples makes all of "
                f"{', '.join(fills)}"
            )
        width = self._width(max(len(feature["input_ids"]) for feature in features))
        batch = {}
        for name, fill in fills.items():
            padded = torch.full((len(features), width), fill, dtype=torch.int64)  # [batch, width]
            for row, feature in zip(padded, features, strict=True):
                row[: len(feature[name])] = torch.as_tensor(feature[name], dtype=torch.int64)
            batch[name] = padded
        return batch

    def batch_shape(self, dataset: datasets.Dataset, *, batch_size: int) -> tuple[int, int]:
        """The largest ``(batch, tokens)`` of this dataset's batches: what memory is planned for."""
        check_integer("batch_size", batch_size, smallest=1)
        if len(dataset) == 0:
            raise ValueError("dataset: it has no examples, so there is no batch")
        longest = 0
        for table in dataset.with_format("arrow").iter(batch_size=_EXAMPLES_PER_SHARD):
            lengths = table["input_ids"].combine_chunks().value_lengths()
            longest = max(longest, *lengths.to_pylist())
        return min(batch_size, len(dataset)), self._width(longest)

    def _width(self, longest: int) -> int:
        if self.length is None:
            return longest
        if longest > self.length:
            raise ValueError(
                f"length={self.length}: an example has {longest} tokens; give length={longest} "
                "or more, or None"
            )
        return self.length
