"""Batches for a model of any task without data: random ids, or blank images.

Memory depends on the shapes of a batch, not on its values, with two exceptions that are kept here:
classifiers of encoder-decoders look at each text's end-of-sequence token, so that every text has
one, and labels are whole numbers for classes, floats for regression and several labels at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memrt.model_source import CLASSIFICATION, task_of

if TYPE_CHECKING:
    from memrt.runner import Batch

__all__ = ["Shape", "batches_of", "random_batches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The batches of a run."""

    batch_size: int = 1
    sequence_length: int = 512
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "accumulation_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.sequence_length * self.accumulation_steps


def random_batches(vocabulary: int, shape: Shape, *, seed: int = 0) -> list[Batch]:
    """One optimizer step's micro-batches for a language model: random ids of the given shape."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch_size, shape.sequence_length)
    batches: list[Batch] = []
    for _ in range(shape.accumulation_steps):
        ids = torch.randint(0, vocabulary, size, generator=generator)
        batches.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        )
    return batches


def batches_of(config: Any, shape: Shape) -> list[Batch]:
    """One optimizer step's micro-batches for a model of this config: random ids, or images.

    An image has the size that the config names; `sequence_length` says nothing about it.
    """
    if hasattr(config, "vocab_size"):
        window = random_batches(config.vocab_size, shape)
        fitted = _FOR_TASK.get(task_of(config))
        return window if fitted is None else [fitted(config, batch) for batch in window]
    if not hasattr(config, "image_size"):
        raise ValueError(
            f"model_type {config.model_type!r} takes neither text nor images; pass window=..., "
            "the micro-batches of one step"
        )
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.zeros(shape.batch_size, config.num_channels, height, width)
    labels = torch.zeros(shape.batch_size, dtype=torch.int64)
    return [
        {"pixel_values": pixels.clone(), "labels": labels.clone()}
        for _ in range(shape.accumulation_steps)
    ]


def _classified(config: Any, batch: Batch) -> Batch:
    """One label a text, or several of a config that says so."""
    ids = batch["input_ids"].clone()
    if getattr(config, "is_encoder_decoder", False):
        end = config.eos_token_id
        ids[ids == end] = (end + 1) % config.vocab_size
        ids[:, -1] = end
    return {**batch, "input_ids": ids, "labels": _class_labels(config, len(ids))}


def _class_labels(config: Any, batch_size: int) -> Tensor:
    kind = config.problem_type or ("regression" if config.num_labels == 1 else None)
    if kind == "multi_label_classification" or (kind == "regression" and config.num_labels > 1):
        return torch.zeros(batch_size, config.num_labels)
    dtype = torch.float32 if kind == "regression" else torch.int64
    return torch.zeros(batch_size, dtype=dtype)


def _tagged(_: Any, batch: Batch) -> Batch:
    """One label a token."""
    return {**batch, "labels": torch.zeros_like(batch["input_ids"])}


def _answered(_: Any, batch: Batch) -> Batch:
    """Where the answer begins and ends."""
    place = torch.zeros(len(batch["input_ids"]), dtype=torch.int64)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return {**inputs, "start_positions": place, "end_positions": place.clone()}


_FOR_TASK: dict[str, Callable[[Any, Batch], Batch]] = {
    CLASSIFICATION: _classified,
    "token-classification": _tagged,
    "question-answering": _answered,
}
