"""Uniform four-bit codes in groups of 256, for matrices that are multiplied by and not updated.

For the elements x of a group, low and high the least and the largest of them:

    minimum = low rounded down to bf16,   scale = (high - minimum) / 15 rounded up to bf16
    code = round((x - minimum) / scale) in 0 ... 15,      x' = minimum + code * scale

so |x - x'| <= scale / 2 for every x: groups of one sign, constant ones and zeros too. (A zero point
among the codes, as Q-GaLore's, cannot hold a group that does not contain zero.) Two codes share a
byte, the element with the even index in the lower half; the last group may be short.

Bytes: 1/2 + 4/256 an element. Temporaries: at most 17 bytes an element to quantise, 13 to restore.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GROUP", "PackedInt4", "int4_dequantize", "int4_quantize", "int4_shapes"]

GROUP = 256
_LARGEST_CODE = 15
# more than bf16's rounding to the nearest, 2^-9, can take back
_MARGIN = 2.0**-7


class PackedInt4(NamedTuple):
    """Codes, two a byte, and a scale and a minimum for each group."""

    codes: Tensor  # uint8 [ceil(elements / 2)]
    scales: Tensor  # bf16 [groups]
    minima: Tensor  # bf16 [groups]


def int4_shapes(num_elements: int) -> tuple[tuple[int], tuple[int], tuple[int]]:
    """The shapes of the three tensors."""
    groups = -(-num_elements // GROUP)
    return (-(-num_elements // 2),), (groups,), (groups,)


def int4_quantize(values: Tensor) -> PackedInt4:
    """Quantise an fp32 tensor of any shape, in row-major order."""
    flat = values.reshape(-1)
    groups = -(-flat.numel() // GROUP)
    padded = flat[-1:].expand(groups * GROUP).clone()  # a short group is filled with its last
    padded[: flat.numel()] = flat
    padded = padded.view(groups, GROUP)
    low, high = padded.aminmax(dim=1)
    minima = (low - low.abs() * _MARGIN).bfloat16()
    scales = ((high - minima.float()) / _LARGEST_CODE * (1.0 + _MARGIN)).bfloat16()
    steps = torch.where(scales > 0, scales, 1.0).float()
    codes = padded.sub_(minima.float()[:, None]).div_(steps[:, None]).round_()
    whole = codes.clamp_(0, _LARGEST_CODE).to(torch.uint8).view(-1)
    even, odd = whole[: flat.numel() : 2], whole[1 : flat.numel() + 1 : 2]
    packed = even.clone()
    packed[: odd.numel()] |= odd << 4
    return PackedInt4(packed, scales, minima)


def int4_dequantize(packed: PackedInt4, shape: tuple[int, ...]) -> Tensor:
    """The fp32 tensor of this shape that the codes stand for."""
    num_elements = torch.Size(shape).numel()
    groups = packed.scales.numel()
    codes = torch.stack([packed.codes & 15, packed.codes >> 4], dim=1).view(-1)
    values = torch.zeros(groups * GROUP, dtype=torch.float32, device=codes.device)
    values[: codes.numel()] = codes
    values = values.view(groups, GROUP)
    values.mul_(packed.scales.float()[:, None]).add_(packed.minima.float()[:, None])
    return values.view(-1)[:num_elements].reshape(shape)
