"""Stochastic rounding of fp32 to bf16, from a counter-based hash instead of a generator.

bf16 has 8 bits of precision: an update of less than 2^-9 of its weight is lost when the sum is
rounded to the nearest, and most updates are. Rounded up with a probability that is the fraction of
the way to the next value, the weight is right in the mean, without the 4 bytes of a master copy:

    r = hash(seed, parameter, lifetime, step, element) in [0, 2^16)
    bf16(x) = the upper 16 bits of (the 32 bits of x) + r

What bf16 has exactly stays as it is; NaN, infinities and what lies beyond bf16's largest number are
rounded to the nearest. The hash is integer arithmetic modulo 2^32: the same bits in PyTorch on any
device and in Triton, the same in a resumed run, and nothing to save but the seed.

    key0, key1 = 62 bits of blake2b(seed, parameter, lifetime)
    hash = mix(mix(element ^ mix(key0 ^ step)) + high ^ key1),  element + 2^32 * high the index

with mix a bijection of 32-bit words (`memrt.kernels.counter_hash`). The lifetime tells steps of one
number apart where a parameter's count of steps begins anew.

Temporaries: 29 bytes an element of a piece of at most 2^16 elements on the CPU (`workspace_bytes`);
none on CUDA. Nothing of it is differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memrt.kernels.compiled import CompiledFunction
from memrt.kernels.counter_hash import key_words, mix
from memrt.kernels.dispatch import uses_triton
from memrt.profiling.ledger import register_workspace

__all__ = [
    "Rounding",
    "random_bits_from",
    "random_bits_reference",
    "rounding_key",
    "stochastic_copy_",
    "stochastic_round_reference",
    "workspace_bytes",
]

SIGN = -(2**31)
PIECE_ELEMENTS = 2**16
SCRATCH_BYTES = 29  # 28.1 were seen, and fewer of compiled pieces
# Compiled code is made for whole pieces; the rest of a parameter, and one too small to be worth
# some seconds of compiling, are rounded eagerly, to the same bits.
COMPILED_FROM_ELEMENTS = 2**18


class Rounding(NamedTuple):
    """How one parameter is rounded in one step."""

    key: tuple[int, int]
    """Of `rounding_key`."""
    step: Tensor
    """The number of the step, 0-dim, on any device: it is not read on the host."""


def rounding_key(seed: int, parameter: int, lifetime: int = 0) -> tuple[int, int]:
    """Two words below 2^31 for a seed, a parameter's number and how often its steps began anew."""
    return key_words(seed, parameter, *([lifetime] if lifetime else []))


def random_bits_reference(index: Tensor, key: Tensor, step: Tensor) -> Tensor:
    """16 random bits (int32) for each index (int64); key [2] and step (0-dim) on its device."""
    return _bits(index.to(torch.int32), (index >> 32).to(torch.int32), key, step)


def random_bits_from(first_index: Tensor, num_elements: int, key: Tensor, step: Tensor) -> Tensor:
    """The bits of fewer than 2^31 neighbours from `first_index` (0-dim int64) on.

    In 32-bit arithmetic, whose vectors hold twice as many: the lower word wraps at most once.
    """
    first = first_index.to(torch.int32)
    low = first + torch.arange(num_elements, dtype=torch.int32, device=first.device)
    wrapped = (low ^ SIGN) < (first ^ SIGN)  # an unsigned comparison
    return _bits(low, (first_index >> 32).to(torch.int32) + wrapped, key, step)


def _bits(low: Tensor, high: Tensor, key: Tensor, step: Tensor) -> Tensor:
    keyed = mix(key[0].to(torch.int32) ^ step.to(torch.int32))
    return mix((mix(low ^ keyed) + high) ^ key[1]) & 0xFFFF


def stochastic_round_reference(x: Tensor, bits: Tensor) -> Tensor:
    """x (fp32) in bf16, rounded away from zero where its lower half and `bits` carry."""
    word = x.view(torch.int32)
    # from bf16's largest number on, a carry would lead to infinity
    special = (word & 0x7FFFFFFF) >= 0x7F7F0000
    carried = (torch.where(special, 0, word) + bits.to(torch.int32)) & -65536
    return torch.where(special, x.bfloat16(), carried.view(torch.float32).bfloat16())


def stochastic_copy_(
    target: Tensor, source: Tensor, *, rounding: Rounding, first_index: int = 0
) -> None:
    """target <- source, rounded stochastically.

    target: bf16. source: fp32, of its shape. first_index: where the first element lies in the
    parameter, in row-major order; a parameter gets the same bits whole or piece by piece.
    """
    _stochastic_copy(target, source, rounding.step, *rounding.key, first_index)


@torch.library.custom_op("memrt::stochastic_copy", mutates_args=("target",))
def _stochastic_copy(
    target: Tensor, source: Tensor, step: Tensor, key0: int, key1: int, first_index: int
) -> None:
    _check(target, source)
    if uses_triton(target):
        from memrt.kernels._triton.stochastic_rounding import launch

        launch(target, source, step, key0, key1, first_index)
        return
    key = torch.tensor([key0, key1])
    flat = target.view(-1) if target.is_contiguous() else target.contiguous().view(-1)
    values = source.contiguous().view(-1)
    for start, stop in _pieces(flat.numel()):
        first = torch.tensor(first_index + start)
        piece = (flat[start:stop], values[start:stop], key, step, first)
        whole = flat.numel() >= COMPILED_FROM_ELEMENTS and stop - start == PIECE_ELEMENTS
        if not (whole and _compiled_piece(*piece)):
            _round_piece(*piece)
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


def _round_piece(
    target: Tensor, values: Tensor, key: Tensor, step: Tensor, first_index: Tensor
) -> None:
    bits = random_bits_from(first_index, values.numel(), key, step)
    target.copy_(stochastic_round_reference(values, bits))


_compiled_piece = CompiledFunction(_round_piece)


@_stochastic_copy.register_fake
def _(target: Tensor, source: Tensor, step: Tensor, key0: int, key1: int, first_index: int) -> None:
    _check(target, source)


def workspace_bytes(target: Tensor, source: Tensor, *_: Any, **__: Any) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    num_bytes = sum(
        tensor.numel() * tensor.element_size()
        for tensor in (target, source)
        if not tensor.is_contiguous()
    )
    if not uses_triton(target):
        num_bytes += SCRATCH_BYTES * min(target.numel(), PIECE_ELEMENTS)
    return num_bytes


register_workspace("memrt::stochastic_copy", workspace_bytes)


def _check(target: Tensor, source: Tensor) -> None:
    if target.dtype is not torch.bfloat16 or source.dtype is not torch.float32:
        raise ValueError(
            f"stochastic rounding is from fp32 to bf16, got {source.dtype} to {target.dtype}"
        )
    if target.shape != source.shape:
        raise ValueError(f"target is {tuple(target.shape)}, the source {tuple(source.shape)}")


def _pieces(num_elements: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_elements, PIECE_ELEMENTS):
        yield start, min(start + PIECE_ELEMENTS, num_elements)
