"""Texts, or pairs of texts, with a class: to token ids as the model's tokenizer frames them.

An example is ``input_ids [tokens]`` with one label. Special tokens, and where a text is cut, are
the tokenizer's business ([CLS] and [SEP] stay), so that training sees what inference will. Costs
4 bytes a token while examples are made, 5 with the types of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ClassExample", "encode_classes"]


@dataclass(frozen=True, slots=True, eq=False)
class ClassExample:
    """One tokenised example; ``num_cut``: tokens of it that the length left out."""

    input_ids: NDArray[np.int32]  # [tokens]
    type_ids: NDArray[np.int8]  # [tokens]: 0, or 1 in the second text of a pair
    label: int
    line: int
    num_cut: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def is_trainable(self) -> bool:
        return len(self.input_ids) > 0

    @property
    def num_masked(self) -> int:
        return 0

    def cut(self, length: int) -> ClassExample:
        """The tokenizer has cut already."""
        assert len(self) <= length
        return self


def encode_classes(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, ...]],
    labels: Sequence[int],
    lines: Sequence[int],
    *,
    cut_to: int | None,
) -> Iterator[ClassExample]:
    """One example a text or pair; ``cut_to``: the most tokens, None for all there are."""
    if cut_to is not None:
        num_special = tokenizer.num_special_tokens_to_add(pair=len(texts[0]) == 2)
        if cut_to <= num_special:
            raise ValueError(
                f"sequence_length={cut_to}: the tokenizer adds {num_special} tokens of its own, "
                "which leaves none for the text"
            )
    whole = _encoded(tokenizer, texts, None)
    for index, (ids, types) in enumerate(whole):
        length = len(ids)
        if cut_to is not None and length > cut_to:
            [(ids, types)] = _encoded(tokenizer, [texts[index]], cut_to)
        yield ClassExample(
            np.asarray(ids, dtype=np.int32),
            np.asarray(types, dtype=np.int8),
            labels[index],
            lines[index],
            num_cut=length - len(ids),
        )


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], cut_to: int | None
) -> list[tuple[list[int], list[int]]]:
    both: list[list[str]] = [list(column) for column in zip(*texts, strict=True)]
    encoding: Any = tokenizer(
        *both,
        return_attention_mask=False,
        return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
        truncation=cut_to is not None,
        max_length=cut_to,
        verbose=False,
    )
    ids = encoding["input_ids"]
    types = encoding.get("token_type_ids") or [[0] * len(each) for each in ids]
    return list(zip(ids, types, strict=True))
