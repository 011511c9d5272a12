"""Eight bits an element: E4M3 codes with a power of two for every 32 neighbours.

For 32 consecutive elements x of a row, with a = max |x|,

    k = the smallest whole number with a <= 448 · 2^k,    code = e4m3(x · 2^-k),    x' = code · 2^k

An element is rounded to 3 bits behind its leading one, 2^-4 of it at most, down to 2^-15 a; below
that by at most 2^-19 a. A power of two rounds nothing itself, so that x' is exact in bf16, and a
row with one large channel loses nothing in its other groups. A row's last group may be shorter. A
group that holds an infinity or NaN comes back as no numbers, all of it.

Bytes: 1 an element, and 1 a group (k + 127, as the exponent of a float: E8M0); temporaries 4 an
element of a piece.

Source: the MXFP8 format of the OCP Microscaling specification, v1.0 (arXiv 2310.10537), which takes
k from the exponent of a alone, so that what is above 448 · 2^k saturates; here k is one more then,
as in torchao's "rceil".
"""

from __future__ import annotations

import torch
from torch import Tensor

from memrt.kernels.mixed_precision import block_rows

__all__ = ["FLOAT8", "GROUP_SIZE", "microscale", "num_groups", "restore"]

FLOAT8 = torch.float8_e4m3fn
GROUP_SIZE = 32
LARGEST_EXPONENT, LARGEST_FRACTION = 8, 0x600000
"""448 = 1.75 · 2^8, as the exponent and the bits of fraction of a float."""
NOT_FINITE = 255


def num_groups(width: int) -> int:
    """Groups of a row of `width` elements."""
    return -(-width // GROUP_SIZE)


def microscale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (E4M3) of rows [tokens, width], and exponents (uint8) [tokens, groups]."""
    tokens, width = rows.shape
    codes = torch.empty_like(rows, dtype=FLOAT8, memory_format=torch.contiguous_format)
    exponents = rows.new_empty(tokens, num_groups(width), dtype=torch.uint8)
    whole = width - width % GROUP_SIZE
    count = block_rows(width, tokens)
    for start in range(0, tokens, count):
        here = slice(start, start + count)
        for columns in (slice(0, whole), slice(whole, width)):
            if columns.start < columns.stop:
                groups = slice(columns.start // GROUP_SIZE, num_groups(columns.stop))
                _fill(rows[here, columns], codes[here, columns], exponents[here, groups])
    return codes, exponents


def _fill(rows: Tensor, codes: Tensor, exponents: Tensor) -> None:
    """Write codes and exponents of groups that are all equally long."""
    groups = exponents.shape[1]
    grouped = rows.view(len(rows), groups, rows.shape[1] // groups)
    wide = grouped.float()
    largest = torch.linalg.vector_norm(wide, float("inf"), dim=2)
    broken = largest.isfinite().logical_not_()
    bits = largest.view(torch.int32)
    exponent = (bits >> 23) - LARGEST_EXPONENT + ((bits & 0x7FFFFF) > LARGEST_FRACTION)
    exponent = exponent.clamp_(min=1).masked_fill_(broken, NOT_FINITE)
    inverse = ((254 - exponent) << 23).view(torch.float32).masked_fill_(broken, float("nan"))
    inverse = inverse.unsqueeze(2)
    scaled = wide * inverse if wide is grouped else wide.mul_(inverse)
    codes.view(scaled.shape).copy_(scaled)
    exponents.copy_(exponent)


def restore(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """x' [tokens, width] in `dtype`, which is bf16, fp16 or fp32."""
    scale = (exponents.to(torch.int32) << 23).view(torch.float32)
    product = torch.float32 if dtype is torch.float16 else dtype  # 2^k need not be one of fp16
    x, scale = codes.to(product), scale.to(product)
    width = codes.shape[1]
    whole = width // GROUP_SIZE
    x[:, : whole * GROUP_SIZE].view(len(x), whole, GROUP_SIZE).mul_(scale[:, :whole, None])
    x[:, whole * GROUP_SIZE :].mul_(scale[:, whole:])
    if dtype is torch.float16:  # whose largest number may have been rounded up
        x.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)
