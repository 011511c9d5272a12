"""Batches of examples of unequal lengths: padded on the right, int64 tensors.

A batch costs 8 bytes a token for each of ids, mask and labels, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memrt.data_settings import check_integer
from memrt.tokenization import IGNORED_LABEL

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["Collator"]

_EXAMPLES_PER_SHARD = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Pads a batch on the right to its longest example, or to ``length``; int64 tensors.

    Labels are ``[batch, width]``, or ``[batch]`` where an example has one class.
    """

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
        if "token_type_ids" in features[0]:
            fills["token_type_ids"] = 0
        width = self._width(max(len(feature["input_ids"]) for feature in features))
        batch = {}
        for name, fill in fills.items():
            if name == "labels" and isinstance(features[0][name], int):
                batch[name] = torch.tensor([each[name] for each in features])  # [batch]
                continue
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
