"""Frozen weights in four bits: NF4 with double quantisation.

The linear layers of the repeated layers keep 0.516 bytes a weight, W ~ level[code] * scale (16
levels, an 8-bit scale for each 64 weights), instead of 2 or 4. Costs a pass over the weight for
each product, which makes its dense weight and drops it, in forward and again in backward (under
`activation_checkpoint` three times a step): one weight at a time is workspace. Embeddings, norms
and the head stay as they are. The whole model is frozen; something else must train (`peft`,
`ladder`). It rounds by about 9 % of a weight's spread, once. Dettmers et al. 2023 (QLoRA), arXiv
2305.14314; see `memrt.kernels.nf4`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memrt.kernels.nf4 import nf4_dequantize, nf4_quantize
from memrt.packed_strategy import PackedStrategy
from memrt.packed_weights import PackedFormat
from memrt.registry import register

if TYPE_CHECKING:
    from memrt.structure import Facts

__all__ = ["NF4"]


def _pack(weight: Tensor, output_axis: int) -> Tensor:
    result: Tensor = nf4_quantize(weight)  # blocks of the storage, whichever way the weight lies
    return result


def _dense(packed: Tensor, shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> Tensor:
    result: Tensor = nf4_dequantize(packed, shape, dtype)
    return result


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class NF4(PackedStrategy):
    """Settings: `head` (pack the head too) and `keep` (names of modules that stay)."""

    name: ClassVar[str] = "nf4"
    packed_format: ClassVar[PackedFormat] = PackedFormat(name="nf4", pack=_pack, dense=_dense)

    def check(self, facts: Facts) -> None:
        """Needs bitsandbytes, and linear layers."""
        if find_spec("bitsandbytes") is None:
            raise ValueError("bitsandbytes is not installed; run: pip install bitsandbytes")
        PackedStrategy.check(self, facts)
