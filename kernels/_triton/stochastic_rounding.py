"""`memrt.kernels.stochastic_rounding` in Triton: the same hash, and bf16 rounding in integers.

bf16 is rounded in integers for the nearest too: Triton's interpreter cuts where a GPU rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.launching import on_device_of
from memrt.kernels.counter_hash import MULTIPLIERS
from memrt.kernels.dispatch import require_triton

FIRST = tl.constexpr(MULTIPLIERS[0])
SECOND = tl.constexpr(MULTIPLIERS[1])
BLOCK = 1024


@triton.jit
def mix(x):
    """A bijection of 32-bit words (uint32)."""
    x = (x ^ (x >> 16)) * FIRST
    x = (x ^ (x >> 15)) * SECOND
    return x ^ (x >> 16)


@triton.jit
def random_bits(index, key0, key1, step):
    """16 random bits (int32) for each index (int64); keys and step are words."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    keyed = mix(low * 0 + (key0 ^ step).to(tl.uint32))  # a word for each lane: all the same
    x = mix(low ^ keyed)
    return (mix((x + high) ^ key1.to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def round_to_bf16(x, carry):
    """x (fp32) in bf16, with `carry` (int32) added below bf16's last bit before the rest is cut."""
    word = x.to(tl.int32, bitcast=True)
    word = tl.where(x != x, 0x7FC00000, word)
    special = (word & 0x7FFFFFFF) >= 0x7F7F0000
    carry = tl.where(special, nearest_carry(x), carry)
    carry = tl.where(x != x, 0, carry)
    return ((word + carry) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def nearest_carry(x):
    """The carry that rounds to the nearest, ties to even."""
    return 0x7FFF + ((x.to(tl.int32, bitcast=True) >> 16) & 1)


@triton.jit(do_not_specialize=["key0", "key1", "first_index"])
def stochastic_copy_kernel(
    target_ptr, source_ptr, step_ptr, num_elements, key0, key1, first_index, BLOCK: tl.constexpr
):
    """target (bf16) <- source (fp32) [num_elements]; step (0-dim fp32) is read on the device."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    step = tl.load(step_ptr).to(tl.int32)
    x = tl.load(source_ptr + offsets, mask=mask, other=0.0)
    bits = random_bits(first_index + offsets, key0, key1, step)
    tl.store(target_ptr + offsets, round_to_bf16(x, bits), mask=mask)


def launch(
    target: Tensor, source: Tensor, step: Tensor, key0: int, key1: int, first_index: int
) -> None:
    """One pass over source and target."""
    require_triton(target, source)
    if target.numel() == 0:
        return
    flat = target.contiguous().view(-1)
    number = step.to(device=target.device, dtype=torch.float32)
    grid = (triton.cdiv(flat.numel(), BLOCK),)
    with on_device_of(target):
        stochastic_copy_kernel[grid](
            flat,
            source.contiguous().view(-1),
            number,
            flat.numel(),
            key0,
            key1,
            first_index,
            BLOCK=BLOCK,
            enable_fp_fusion=False,  # nothing to fuse, and Triton warns where it is not said
        )
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))
