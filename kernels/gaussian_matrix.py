"""A matrix of independent normal numbers from a key: made again whenever it is needed, never kept.

For [rows, columns] with N elements, H = ceil(N / 2) and pairs k = 0 ... H - 1 (Box and Muller):

    a, b = (hash(2 k) + 1/2) / 2^32, (hash(2 k + 1) + 1/2) / 2^32
    element k     = std · sqrt(-2 ln a) · cos(2 pi b)
    element k + H = std · sqrt(-2 ln a) · sin(2 pi b)
    hash(i) = mix(mix(i ^ key0) ^ key1)

with mix a bijection of 32-bit words (`memrt.kernels.counter_hash`).
Logarithm, root and sine are taken in fp64 and rounded to fp32 once: one device gives what another
does, but for an fp64 error on a boundary of fp32, of one element in some 10^8, which is then off by
one unit in the last place; and a resumed run gives the same bits.

Bytes: the result, 4 an element. On CUDA, where it is one pass of one Triton kernel, nothing else;
on the CPU scratch of at most 72 bytes a pair for PIECE_PAIRS pairs at a time (`workspace_bytes`).
Time on one CPU core (2^20 elements, torch 2.13): 33 ms in about 60 passes; 4 ms where a matrix is
large enough to be compiled (`COMPILED_FROM_ELEMENTS`), half of torch.randn's 8.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from memrt.kernels.compiled import CompiledFunction
from memrt.kernels.counter_hash import mix
from memrt.kernels.dispatch import uses_triton
from memrt.profiling.ledger import register_workspace

__all__ = ["gaussian_matrix", "gaussian_pairs_reference", "workspace_bytes"]

MASK = 0xFFFFFFFF
Key = tuple[int, int] | tuple[Tensor, Tensor]
PIECE_PAIRS = 2**16  # 5 MiB of scratch
SCRATCH_BYTES = 72
# Compiled code is made for whole pieces; the rest of a matrix, and a matrix too small to be worth
# some seconds of compiling, are computed eagerly.
COMPILED_FROM_ELEMENTS = 2**18


def _hash(index: Tensor, key: Key) -> Tensor:
    """32 bits (int64) for each index below 2^32 (int64)."""
    return mix(mix(index.to(torch.int32) ^ key[0]) ^ key[1]).to(torch.int64) & MASK


def gaussian_pairs_reference(pairs: Tensor, key: Key) -> tuple[Tensor, Tensor]:
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
    if uses_triton(target):
        from memrt.kernels._triton.gaussian_matrix import launch

        launch(target, key0, key1, std)
        return
    flat = target.view(-1)
    num_pairs = -(-flat.numel() // 2)
    device = target.device
    numbers = (
        torch.tensor([key0, key1], device=device),
        torch.tensor(std, dtype=torch.float64, device=device),
    )
    for start in range(0, num_pairs, PIECE_PAIRS):
        stop = min(start + PIECE_PAIRS, num_pairs)
        first = flat[start:stop]
        second = flat[num_pairs + start : num_pairs + stop]  # odd sizes: one short at the end
        whole = flat.numel() >= COMPILED_FROM_ELEMENTS and second.numel() == PIECE_PAIRS
        piece = (first, second, torch.tensor(start, device=device), *numbers)
        if not (whole and _compiled_piece(*piece)):
            _fill_piece(*piece)


def _fill_piece(first: Tensor, second: Tensor, start: Tensor, key: Tensor, std: Tensor) -> None:
    """The pairs from ``start`` on."""
    pairs = start + torch.arange(first.numel(), device=first.device)
    cosines, sines = gaussian_pairs_reference(pairs, (key[0], key[1]))
    first.copy_(cosines.mul_(std))
    second.copy_(sines[: second.numel()].mul_(std))


_compiled_piece = CompiledFunction(_fill_piece)


@_fill.register_fake
def _(target: Tensor, key0: int, key1: int, std: float) -> None:
    return None


def workspace_bytes(target: Tensor, *_: Any, **__: Any) -> int:
    """The most bytes of temporaries that are alive at once inside the operator.

    On the CPU a bound for the eager passes; compiled ones take fewer.
    """
    if uses_triton(target):
        return 0
    return SCRATCH_BYTES * min(-(-target.numel() // 2), PIECE_PAIRS)


register_workspace("memrt::fill_gaussian", workspace_bytes)
