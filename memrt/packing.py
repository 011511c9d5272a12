"""Brings tokenised examples to ``sequence_length`` and counts what that cost.

- *packed*: documents, each ended by EOS, are joined and cut into blocks of exactly
  ``sequence_length`` tokens. No padding, but attention sees the neighbouring document. What does
  not fill the last block is left over (below ``sequence_length`` tokens a split).
- *not packed*: one example a document; ``truncation`` says what happens to a longer one. A batch
  is padded to its longest example, so (batch x longest - tokens) positions are spent on padding.

An example or block in which no trained token is left (a prompt that fills it) is left out, because
its loss would be the mean over nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memrt.class_examples import ClassExample
from memrt.data_files import TextStream
from memrt.data_records import Kind, RecordFile
from memrt.data_settings import DataSettings, Truncation
from memrt.tokenization import Encoded

__all__ = [
    "Example",
    "SplitSummary",
    "arrange",
    "is_packed",
    "num_tokens",
    "pack",
    "require_fit",
    "split",
]

Source = TextStream | RecordFile
Example = Encoded | ClassExample


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """What became of one split; tokens are those of its examples, padding not counted."""

    source: str
    kind: Kind
    packed: bool
    truncation: Truncation | None  # None where packed: nothing is truncated
    num_documents: int  # records; a text is one
    num_examples: int
    num_tokens: int
    num_masked_tokens: int  # label -100
    longest_example: int  # tokens
    num_truncated_examples: int
    num_truncated_tokens: int
    num_dropped_examples: int  # too long, truncation="drop"
    num_untrainable_examples: int  # left out: no trained token in the example or block
    num_leftover_tokens: int  # did not fill the last block


def num_tokens(examples: Iterable[Example]) -> int:
    return sum(len(example) for example in examples)


def is_packed(source: Source, settings: DataSettings) -> bool:
    return source.kind == "text" if settings.packing == "auto" else settings.packing


def pack(examples: Iterable[Encoded], length: int) -> Iterator[Encoded]:
    """Blocks of exactly ``length`` tokens; the rest is left over."""
    ids, labels, size = [], [], 0
    for example in examples:
        ids.append(example.input_ids)
        labels.append(example.labels)
        size += len(example)
        if size < length:
            continue
        joined_ids, joined_labels = np.concatenate(ids), np.concatenate(labels)  # [size]
        full = size - size % length
        for start in range(0, full, length):
            stop = start + length
            yield Encoded(joined_ids[start:stop], joined_labels[start:stop])
        ids, labels, size = [joined_ids[full:]], [joined_labels[full:]], size - full


def require_fit(examples: Sequence[Example], source: Source, settings: DataSettings) -> None:
    """Refuses examples that are too long where nobody said what to do with them."""
    length = settings.sequence_length
    if is_packed(source, settings) or settings.truncation in ("cut", "drop"):
        return
    num_too_long = sum(len(example) > length for example in examples)
    if num_too_long:
        longest = max(examples, key=len)
        raise ValueError(
            f"{source.name}: {num_too_long} of {len(examples)} examples are longer than "
            f"sequence_length={length} (the longest, {source.place} {longest.line}, has "
            f"{len(longest)} tokens); give sequence_length={len(longest)}, or truncation='cut' "
            "(keeps their beginning), or truncation='drop' (leaves them out)"
        )


def split(
    examples: Sequence[Example], source: Source, settings: DataSettings
) -> tuple[list[Example], list[Example]]:
    """Train and evaluation, each in the order of the file and with at least one example."""
    if len(examples) < 2:
        found, remedy = "one record", "give evaluation_path, or more of them"
        if isinstance(source, TextStream):
            found = f"{len(examples)} block(s) of sequence_length={settings.sequence_length}"
            remedy = "give a shorter sequence_length, evaluation_path, or more text"
        raise ValueError(
            f"evaluation_fraction={settings.evaluation_fraction}: {source.name} has {found} and a "
            f"split needs two; {remedy}"
        )
    num_held_out = round(len(examples) * settings.evaluation_fraction)
    num_held_out = min(max(num_held_out, 1), len(examples) - 1)
    # random() is the one generator that Python promises to keep equal between its versions.
    generator = random.Random(settings.seed)
    keys = [generator.random() for _ in examples]
    held_out = set(sorted(range(len(examples)), key=keys.__getitem__)[:num_held_out])
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


def arrange(
    examples: Sequence[Example], source: Source, settings: DataSettings, *, part: str = ""
) -> tuple[list[Example], SplitSummary]:
    """Packs, cuts or drops; ``require_fit`` has been asked before. ``part``: of a split file."""
    length, packed = settings.sequence_length, is_packed(source, settings)
    truncation = None if packed else settings.truncation or "error"
    num_too_long = sum(len(example) > length for example in examples)
    fitting: list[Example]
    if packed:
        fitting = list(pack((e for e in examples if isinstance(e, Encoded)), length))
    else:
        fitting = [e.cut(length) for e in examples if truncation == "cut" or len(e) <= length]
    kept = [example for example in fitting if example.is_trainable]
    if not kept:
        raise ValueError(_nothing_left_message(examples, fitting, source, settings, part))
    num_lost_tokens = num_tokens(examples) - num_tokens(fitting)
    num_lost_tokens += sum(example.num_cut for example in examples)
    num_too_long += sum(example.num_cut > 0 for example in examples)
    cut = truncation == "cut"
    return kept, SplitSummary(
        source=source.name,
        kind=source.kind,
        packed=packed,
        truncation=truncation,
        num_documents=1 if isinstance(source, TextStream) else len(examples),
        num_examples=len(kept),
        num_tokens=num_tokens(kept),
        num_masked_tokens=sum(example.num_masked for example in kept),
        longest_example=max(len(example) for example in kept),
        num_truncated_examples=num_too_long if cut else 0,
        num_truncated_tokens=num_lost_tokens if cut else 0,
        num_dropped_examples=num_too_long if truncation == "drop" else 0,
        num_untrainable_examples=len(fitting) - len(kept),
        num_leftover_tokens=num_lost_tokens if packed else 0,
    )


def _nothing_left_message(
    examples: Sequence[Example],
    fitting: Sequence[Example],
    source: Source,
    settings: DataSettings,
    part: str,
) -> str:
    length = f"sequence_length={settings.sequence_length}"
    name = f"{source.name} ({part} part)" if part else source.name
    if fitting:
        longest = max(len(example) for example in examples)
        return (
            f"{name}: with {length} nothing but prompts, which are not trained on, is left "
            f"in {len(fitting)} example(s); the longest has {longest} tokens: give a longer "
            "sequence_length"
        )
    if is_packed(source, settings):
        total = num_tokens(examples)
        return (
            f"{name}: {total} tokens do not fill one block of {length}; "
            f"give sequence_length={total} or less, or more text"
        )
    shortest = min(len(example) for example in examples)
    return (
        f"{name}: all {len(examples)} examples are longer than {length} and "
        f"truncation='drop' leaves none; the shortest has {shortest} tokens"
    )
