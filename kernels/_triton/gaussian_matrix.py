"""`memrt.kernels.gaussian_matrix` in Triton: a pair of elements from two hashes, and no scratch.

In fp64 as the reference is, with CUDA's own logarithm and sines (errors below 2 units in the last
of 53 bits): fp32 ones would make another matrix than the CPU's. Where a GPU has few fp64 units
(consumer cards: one for 64 of fp32) that arithmetic is the time it takes, elsewhere the stores.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.launching import on_device_of
from memrt.kernels._triton.stochastic_rounding import mix
from memrt.kernels.dispatch import require_triton

BLOCK = 512
NUM_WARPS = 4
TURN = tl.constexpr(2.0 * math.pi)
WORD = tl.constexpr(2.0**-32)


@triton.jit
def hash_words(index, key0, key1):
    """32 bits (uint32) for each index (uint32)."""
    return mix(mix(index ^ key0.to(tl.uint32)) ^ key1.to(tl.uint32))


@triton.jit
def uniform(word):
    """In (0, 1), exactly (word + 1/2) / 2^32 in fp64."""
    return (word.to(tl.float64) + 0.5) * WORD


@triton.jit(do_not_specialize=["key0", "key1"])
def fill_gaussian_kernel(
    target_ptr, num_elements, num_pairs, key0, key1, std: tl.float64, BLOCK: tl.constexpr
):
    """target (fp32) [num_elements], contiguous: pair k writes elements k and k + num_pairs.

    The annotation of `std` keeps the launcher from making fp32 of it.
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = (2 * pair).to(tl.uint32)
    radius = tl.sqrt(-2.0 * tl.log(uniform(hash_words(word, key0, key1))))
    angle = uniform(hash_words(word + 1, key0, key1)) * TURN
    is_pair = pair < num_pairs
    tl.store(target_ptr + pair, (radius * tl.cos(angle) * std).to(tl.float32), mask=is_pair)
    other = pair + num_pairs
    is_other = is_pair & (other < num_elements)  # odd sizes: one short at the end
    tl.store(target_ptr + other, (radius * tl.sin(angle) * std).to(tl.float32), mask=is_other)


def launch(target: Tensor, key0: int, key1: int, std: float) -> None:
    """One pass over a contiguous target."""
    require_triton(target)
    num_pairs = -(-target.numel() // 2)
    if num_pairs == 0:
        return
    with on_device_of(target):
        fill_gaussian_kernel[(triton.cdiv(num_pairs, BLOCK),)](
            target,
            target.numel(),
            num_pairs,
            key0,
            key1,
            std,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # the reference's bits
        )
