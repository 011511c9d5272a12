"""A few numbers that tell a weight W [rows, columns] from another in whatever precision both are.

Form (dense or packed), count, norm and 16 sums c_k = Σ_ij r_ik W_ij s_jk with fixed signs r and s:
the mean of (c_k - c'_k)² over k is ‖W - W'‖² but for chance, which is compared with what rounding
and packing do. Two dense weights are told apart by 0.4 % of the norm, such as by adapters that were
folded in; where either is packed, by half of it: other weights, but not adapters.

After W. Johnson and J. Lindenstrauss 1984; 32 operations a weight, 200 bytes of text.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["checked_sums", "sums_differ", "weight_sums"]

_NUM_SUMS = 16
# ‖W - W'‖ / ‖W‖ of one weight, measured on normal, uniform, Laplace, Student's t (2 to 4 degrees of
# freedom) and log-normal ones, and with 20-fold columns or rows, [32, 64] to [4096, 2048]: nf4 0.09
# to 0.17, int8 0.004 to 0.05; rounded to bf16 as here 0, by way of fp16 0.0015. 16 sums tell it but
# for a factor of 2.2 (once in 10⁹). Of two unrelated weights it is 1.4.
_ROUNDED, _PACKED = 4e-3, 0.5
_LEAST_HALF = 2.0**-24


@torch.no_grad()
def weight_sums(weight: Tensor, *, packed: bool) -> str:
    """Of one weight, now dense; as bfloat16, whose products with signs are exact anywhere."""
    rows = weight.reshape(-1, weight.shape[-1])
    right = _signs("columns", rows.shape[1]).to(rows.device)
    left = _signs("rows", rows.shape[0]).to(rows.device)
    sums, square = torch.zeros(_NUM_SUMS, dtype=torch.float64), 0.0
    # on a CPU what stays in its cache: 4 ns a weight (one shared core), 7 with the larger pieces
    elements = 1 << (20 if rows.device.type == "cpu" else 24)
    step = max(1, elements // rows.shape[1])
    for piece, signs in zip(torch.split(rows, step), torch.split(left, step), strict=True):
        rounded = piece.to(torch.bfloat16).float()
        sums += ((rounded @ right) * signs).sum(0).cpu().double()
        square += float(torch.linalg.vector_norm(rounded)) ** 2
    numbers = [rows.numel(), math.sqrt(square), *sums.tolist()]
    return " ".join(["packed" if packed else "dense", *(f"{number:.6g}" for number in numbers)])


@lru_cache(maxsize=8)
def _signs(side: str, count: int) -> Tensor:
    """[count, 16] of 1 and -1, the same everywhere and for ever."""
    drawn = bytearray(hashlib.shake_256(side.encode()).digest(count * _NUM_SUMS // 8))
    octets = torch.frombuffer(drawn, dtype=torch.uint8)[:, None]
    bits = (octets >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.view(count, _NUM_SUMS).float() * 2 - 1


def sums_differ(recorded: str, found: str) -> bool:
    """Whether two weights differ by more than precisions do."""
    (was, *before), (is_now, *after) = recorded.split(), found.split()
    bound = _PACKED if "packed" in (was, is_now) else _ROUNDED
    count, norm = map(float, before[:2])
    apart = [float(one) - float(other) for one, other in zip(before[2:], after[2:], strict=True)]
    distance = math.sqrt(sum(each * each for each in apart) / _NUM_SUMS)
    # below half of its smallest number fp16 has nothing
    return before[0] != after[0] or distance > bound * norm + _LEAST_HALF * math.sqrt(count)


def checked_sums(values: Any) -> dict[str, str]:
    """What `weight_sums` gave for each name, from a file; `ValueError` where it is not that."""
    if not isinstance(values, dict):
        raise ValueError(f"weights={values!r}")
    for name, text in values.items():
        form, *numbers = str(text).split() or [""]
        if form not in ("dense", "packed") or len(list(map(float, numbers))) != _NUM_SUMS + 2:
            raise ValueError(f"{name}={text!r}")
    return values
