"""`memrt.kernels.ladder` in Triton: the down-projection with gate and sum in its epilogue.

A program makes 64 tokens × 64 side channels (fewer where the side is narrower). Programs of the
same tokens come one after the other, so that a hidden state is read from memory once and by the
others from the cache; D never reaches memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.launching import on_device_of
from memrt.kernels.dispatch import require_triton

BLOCK_TOKENS = 64
BLOCK_SIDE = 64
BLOCK_BYTES = 64
"""Bytes of a hidden state that are multiplied at a time."""
NUM_WARPS = 8


@triton.jit
def ladder_down_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    gate_ptr,
    mixed_ptr,
    difference_ptr,
    num_tokens,
    side,
    hidden_size,
    HAS_BIAS: tl.constexpr,
    SCALAR_GATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIDE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Z and S - D of one tile; D is rounded to the dtype of H, as a linear layer's output is."""
    tiles = tl.cdiv(side, BLOCK_SIDE)
    program = tl.program_id(0)
    first_token = (program // tiles).to(tl.int64) * BLOCK_TOKENS
    first_channel = (program % tiles) * BLOCK_SIDE
    row, column = tl.arange(0, BLOCK_TOKENS)[:, None], tl.arange(0, BLOCK_SIDE)
    is_token, is_channel = first_token + row < num_tokens, first_channel + column < side
    # offsets inside a tile have 32 bits: with 64 they would not fit into the registers
    hidden_ptr += first_token * hidden_size
    weight_ptr += first_channel.to(tl.int64) * hidden_size

    down = tl.zeros((BLOCK_TOKENS, BLOCK_SIDE), dtype=tl.float32)
    for first in range(0, hidden_size, BLOCK_HIDDEN):
        inner = first + tl.arange(0, BLOCK_HIDDEN)
        is_inner = inner < hidden_size
        h = tl.load(
            hidden_ptr + (row * hidden_size + inner[None, :]),
            mask=is_token & is_inner[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + (column[None, :] * hidden_size + inner[:, None]),
            mask=is_channel[None, :] & is_inner[:, None],
            other=0.0,
        )
        down = tl.dot(h, w, down, input_precision="ieee")
    channels = first_channel + column
    if HAS_BIAS:
        down += tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    down = down.to(hidden_ptr.dtype.element_ty).to(tl.float32)

    offsets = row * side + channels[None, :]
    mask = is_token & is_channel[None, :]
    start = first_token * side
    state = tl.load(state_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + channels * (0 if SCALAR_GATE else 1), mask=is_channel, other=0.0)
    gate = gate.to(state_ptr.dtype.element_ty).to(tl.float32)[None, :]
    difference = state - down
    # exact at both ends
    mixed = tl.where(gate < 0.5, down + gate * difference, state - (1 - gate) * difference)
    tl.store(mixed_ptr + start + offsets, mixed.to(mixed_ptr.dtype.element_ty), mask=mask)
    narrow = difference.to(difference_ptr.dtype.element_ty)
    tl.store(difference_ptr + start + offsets, narrow, mask=mask)


def launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    gate: Tensor,
    mixed: Tensor,
    difference: Tensor,
) -> None:
    """Fill `mixed` and `difference` [tokens, side]; all tensors contiguous, tokens flat."""
    require_triton(hidden, weight, state, gate, mixed, difference)
    num_tokens, hidden_size = hidden.shape
    side = weight.shape[0]
    if num_tokens == 0:
        return
    block_side = min(BLOCK_SIDE, max(16, triton.next_power_of_2(side)))
    grid = (triton.cdiv(num_tokens, BLOCK_TOKENS) * triton.cdiv(side, block_side),)
    with on_device_of(hidden):
        ladder_down_kernel[grid](
            hidden,
            weight,
            weight if bias is None else bias,
            state,
            gate,
            mixed,
            difference,
            num_tokens,
            side,
            hidden_size,
            HAS_BIAS=bias is not None,
            SCALAR_GATE=gate.numel() == 1,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_SIDE=block_side,
            BLOCK_HIDDEN=BLOCK_BYTES // hidden.element_size(),
            num_warps=NUM_WARPS,
        )
