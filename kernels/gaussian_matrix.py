"""A matrix of independent normal numbers from a key: made again whenever it is needed, never kept.

For [rows, columns] with N elements, H = ceil(N / 2) and pairs k = 0 ... H - 1 (Box and Muller):

    a, b = (hash(2 k) + 1/2) / 2^32, (hash(2 k + 1) + 1/2) / 2^32
    element k     = std · sqrt(-2 ln a) · cos(2 pi b)
    element k + H = std · sqrt(-2 ln a) · sin(2 pi b)
    hash(i) = mix(mix(i ^ key0) ^ key1)

with mix a bijection of 32-bit words: xor-shift, multiply, xor-shift, multiply, xor-shift.
Logarithm, root and sine are taken in fp64 and rounded to fp32 once: one device gives what another
does, but for an fp64 error on a boundary of fp32, and a resumed run gives the same bits.

Bytes: the result, 4 an element, and scratch of 72 bytes a pair for at most PIECE_PAIRS pairs at a
time (`workspace_bytes`). Time: about 30 passes over it; on a CPU, some 20 times torch.randn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from memrt.profiling.ledger import register_workspace

__all__ = ["gaussian_matrix", "gaussian_pairs_reference", "matrix_key", "workspace_bytes"]

MASK = 0xFFFFFFFF
# odd, and below 2^31: then 32-bit products do not overflow int64
MULTIPLIERS = (0x7FEB352D, 0x68BC21EB)
# a bound on scratch, 5 MiB on the CPU and 320 MiB on a GPU, where small pieces cost launches
PIECE_PAIRS = {"cpu": 2**16, "cuda": 2**22}
SCRATCH_BYTES = 72


def matrix_key(*numbers: int) -> tuple[int, int]:
    """Two words below 2^31 for a seed and whatever else sets a matrix apart."""
    text = ",".join(str(number) for number in numbers)
    digest = blake2b(text.encode(), digest_size=8).digest()
    low, high = (int.from_bytes(part, "big") >> 1 for part in (digest[:4], digest[4:]))
    return low, high


def _mix(x: Tensor) -> Tensor:
    first, second = MULTIPLIERS
    x = ((x ^ (x >> 16)) * first) & MASK
    x = ((x ^ (x >> 15)) * second) & MASK
    return x ^ (x >> 16)


def _hash(index: Tensor, key: tuple[int, int]) -> Tensor:
    """32 bits (int64) for each index below 2^32."""
    return _mix(_mix(index ^ key[0]) ^ key[1])


def gaussian_pairs_reference(pairs: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two normal numbers (fp64) for each pair's number (int64)."""
    a = (_hash(2 * pairs, key).double() + 0.5) / 2**32
    b = (_hash(2 * pairs + 1, key).double() + 0.5) / 2**32
    radius = torch.sqrt(-2.0 * torch.log(a))
    angle = b * (2.0 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def gaussian_matrix(
    rows: int, columns: int, *, key: tuple[int, int], std: float, device: torch.device
) -> Tensor:
    """Return [rows, columns] in fp32, each element normal with this standard deviation."""
    if rows * columns > MASK:
        raise ValueError(f"{rows} x {columns} elements are more than the hash tells apart (2^32)")
    result = torch.empty(rows, columns, dtype=torch.float32, device=device)
    _fill(result, *key, std)
    return result


@torch.library.custom_op("memrt::fill_gaussian", mutates_args=("target",))
def _fill(target: Tensor, key0: int, key1: int, std: float) -> None:
    flat = target.view(-1)
    num_pairs = -(-flat.numel() // 2)
    for start, stop in _pieces(num_pairs, PIECE_PAIRS[_kind(target)]):
        pairs = torch.arange(start, stop, device=target.device)
        first, second = gaussian_pairs_reference(pairs, (key0, key1))
        flat[start:stop] = first.mul_(std)
        rest = flat[num_pairs + start : num_pairs + stop]  # odd sizes: one short at the end
        rest.copy_(second[: rest.numel()].mul_(std))


@_fill.register_fake
def _(target: Tensor, key0: int, key1: int, std: float) -> None:
    return None


def workspace_bytes(target: Tensor, *_: Any, **__: Any) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    return SCRATCH_BYTES * min(-(-target.numel() // 2), PIECE_PAIRS[_kind(target)])


register_workspace("memrt::fill_gaussian", workspace_bytes)


def _kind(target: Tensor) -> str:
    return "cpu" if target.device.type == "cpu" else "cuda"


def _pieces(num_pairs: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_pairs, size):
        yield start, min(start + size, num_pairs)
