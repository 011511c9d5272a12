"""Frozen weights in eight bits, with one scale for each output of a layer.

For W [out, in], a row W_i of an output: W_i ~ code * max |W_i| / 127. As `nf4`, with 1 + 4 / in
bytes a weight instead of 0.516, and a rounding of at most 0.4 % of an output's largest weight.
Activations are not quantised. Costs time and saves none: each product makes its dense weight in the
input's dtype and drops it, in forward and again in backward, and is then the product that it would
have been. That is at least one read and one write of the weight more for each product (under
`activation_checkpoint` three times a step), which weighs the less the more tokens there are; beside
the one dense weight an fp32 piece of it, about 16 MiB, is workspace. The arithmetic is torch's own;
see `memrt.kernels.int8_weights`. After Dettmers et al. 2022 (LLM.int8()), arXiv 2208.07339.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memrt.kernels.int8_weights import int8_dequantize, int8_quantize
from memrt.packed_strategy import PackedStrategy
from memrt.packed_weights import PackedFormat
from memrt.registry import register

__all__ = ["Int8"]


def _pack(weight: Tensor, output_axis: int) -> Tensor:
    result: Tensor = int8_quantize(weight, output_axis)
    return result


def _dense(packed: Tensor, shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> Tensor:
    result: Tensor = int8_dequantize(packed, shape, axis, dtype)
    return result


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Int8(PackedStrategy):
    """Settings: `head` (pack the head too) and `keep` (names of modules that stay)."""

    name: ClassVar[str] = "int8"
    packed_format: ClassVar[PackedFormat] = PackedFormat(name="int8", pack=_pack, dense=_dense)
