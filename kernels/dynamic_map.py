"""The dynamic 8-bit type: 256 values a map, one fp32 scale a block of 256 elements.

    value = map[code] * scale_of_its_block,     scale = max |value| of the block

Seven decades, 10^-6 to 10^0; the larger the decade, the more of its bits are fraction. A value in
the top decade is off by at most 0.7 % of the block's scale (signed; 0.35 % unsigned), and the error
relative to the value doubles with every decade down, as in a float of shrinking precision.

Bytes: 1 + 4 / 256 an element, and 1 KiB for a map. The maps are made by plain Python, without a
look at a tensor's values, so that they can be made under a fake mode.

Source: Dettmers, arXiv 1511.04561 (the type), arXiv 2110.02861 (blocks, and the unsigned map).
"""

from __future__ import annotations

import struct
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "BLOCK_SIZE",
    "NUM_CODES",
    "dequantize_blockwise_reference",
    "dynamic_map",
    "num_blocks",
    "quantize_blockwise_reference",
]

BLOCK_SIZE = 256
NUM_CODES = 256


def num_blocks(num_elements: int) -> int:
    """How many blocks, and so scales, a tensor of `num_elements` has."""
    return -(-num_elements // BLOCK_SIZE)


def _float32(value: float) -> float:
    """Round a Python float to the nearest fp32 value."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _interval_means(num_intervals: int) -> list[float]:
    """Centres of equal intervals of [0.1, 1], in the fp32 steps of `torch.linspace`."""
    low = _float32(0.1)
    width = _float32(_float32(1.0 - low) / num_intervals)
    half = (num_intervals + 1) // 2
    # linspace counts from the nearer end, with one rounding for multiply and add
    bounds = [
        _float32(low + width * i if i < half else 1.0 - width * (num_intervals - i))
        for i in range(num_intervals + 1)
    ]
    return [_float32(_float32(a + b) / 2) for a, b in pairwise(bounds)]


def dynamic_map(*, signed: bool) -> list[float]:
    """The 256 values of the dynamic 8-bit type, ascending, as fp32 numbers.

    Decade i = 0 ... 6, that is 10^(i-6) * [0.1, 1], is cut into 2^i intervals (2^(i+1) unsigned)
    whose centres are values. 0 and 1 complete the map; -1 is not in it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        unit = _float32(10 ** (decade - 6))
        for mean in _interval_means(2**decade if signed else 2 ** (decade + 1)):
            magnitude = _float32(unit * mean)
            values.extend((magnitude, -magnitude) if signed else (magnitude,))
    assert len(values) == NUM_CODES
    return sorted(values)


def quantize_blockwise_reference(values: Tensor, code_map: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n] (uint8) and scales [num_blocks] (fp32) of `values` [n]: the nearest code."""
    num_padding = num_blocks(values.numel()) * BLOCK_SIZE - values.numel()
    blocks = torch.nn.functional.pad(values, (0, num_padding)).view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(dim=1)  # [num_blocks]
    normalised = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    midpoints = (code_map[1:] + code_map[:-1]) / 2
    codes = torch.searchsorted(midpoints, normalised).to(torch.uint8)
    return codes.view(-1)[: values.numel()], scales


def dequantize_blockwise_reference(codes: Tensor, scales: Tensor, code_map: Tensor) -> Tensor:
    """The fp32 values [n] that codes [n] and scales [num_blocks] stand for."""
    return code_map[codes.int()] * scales.repeat_interleave(BLOCK_SIZE)[: codes.numel()]
