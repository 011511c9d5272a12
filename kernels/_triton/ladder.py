"""`memrt.kernels.ladder` in Triton: the down-projection with gate and sum in its epilogue.

A program makes 64 tokens × 64 side channels (fewer where the side is narrower). Programs of the
same tokens come one after the other, so that a hidden state is read from memory once and by the
others from the cache; D never reaches memory. Where H is kept in eight bits, the first program of
some tokens writes them of what it multiplies: a piece is as wide as a group of
`memrt.kernels.microscaled_fp8` then, twice as wide as else in fp32, so that half the tokens fit.

Gate and sum alone are one pass over D and S, and so is their backward over dZ and S - D: a program
goes down a strip of tokens of 64 channels, writes dS and dD, and keeps the sums by channel of
dZ (S - D) and of dD in registers until the strip ends; PyTorch adds up the strips. No atomics: the
same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.launching import on_device_of
from memrt.kernels._triton.microscaled_fp8 import microscaled
from memrt.kernels.dispatch import require_triton
from memrt.kernels.ladder_gradients import strips_of
from memrt.kernels.microscaled_fp8 import GROUP_SIZE

BLOCK_TOKENS = 64
BLOCK_SIDE = 64
BLOCK_BYTES = 64
"""Bytes of a hidden state that are multiplied at a time."""
NUM_WARPS = 8
MIX_TOKENS = 16
"""Of a tile of gate and sum alone."""


@triton.jit
def gate_of(gate_ptr, channels, is_channel, dtype: tl.constexpr, SCALAR_GATE: tl.constexpr):
    """The gate of some channels [1, channels], rounded to the dtype that it is multiplied in."""
    gate = tl.load(gate_ptr + channels * (0 if SCALAR_GATE else 1), mask=is_channel, other=0.0)
    return gate.to(dtype).to(tl.float32)[None, :]


@triton.jit
def store_mixed(down, state, gate, mixed_ptr, difference_ptr, offsets, mask):
    """Write Z, exact at both ends of the gate, and S - D."""
    difference = state - down
    mixed = tl.where(gate < 0.5, down + gate * difference, state - (1 - gate) * difference)
    tl.store(mixed_ptr + offsets, mixed.to(mixed_ptr.dtype.element_ty), mask=mask)
    narrow = difference.to(difference_ptr.dtype.element_ty)
    tl.store(difference_ptr + offsets, narrow, mask=mask)


@triton.jit
def product_of(
    hidden_ptr,
    weight_ptr,
    codes_ptr,
    exponents_ptr,
    first_token,
    first_channel,
    is_token,
    is_channel,
    hidden_size,
    KEEPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIDE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """H Wᵀ of a tile, fp32 [tokens, channels].

    With `KEEPS` the first tile of some tokens keeps their codes; BLOCK_HIDDEN is a group's size.
    """
    row, column = tl.arange(0, BLOCK_TOKENS)[:, None], tl.arange(0, BLOCK_SIDE)
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
        if KEEPS and first_channel == 0:
            code, exponent = microscaled(h.to(tl.float32))
            token = first_token + row
            at = token * hidden_size + inner[None, :]
            tl.store(codes_ptr + at, code, mask=is_token & is_inner[None, :])
            at = token * tl.cdiv(hidden_size, BLOCK_HIDDEN) + first // BLOCK_HIDDEN
            tl.store(exponents_ptr + at, exponent, mask=is_token)
    return down


@triton.jit
def ladder_down_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    gate_ptr,
    mixed_ptr,
    difference_ptr,
    codes_ptr,
    exponents_ptr,
    num_tokens,
    side,
    hidden_size,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    SCALAR_GATE: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIDE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Z and S - D, or D, of one tile; D is rounded to the dtype of H, as a linear layer's is."""
    tiles = tl.cdiv(side, BLOCK_SIDE)
    program = tl.program_id(0)
    first_token = (program // tiles).to(tl.int64) * BLOCK_TOKENS
    first_channel = (program % tiles) * BLOCK_SIDE
    row, column = tl.arange(0, BLOCK_TOKENS)[:, None], tl.arange(0, BLOCK_SIDE)
    is_token, is_channel = first_token + row < num_tokens, first_channel + column < side
    down = product_of(
        hidden_ptr,
        weight_ptr,
        codes_ptr,
        exponents_ptr,
        first_token,
        first_channel,
        is_token,
        is_channel,
        hidden_size,
        KEEPS,
        BLOCK_TOKENS,
        BLOCK_SIDE,
        BLOCK_HIDDEN,
    )
    channels = first_channel + column
    if HAS_BIAS:
        down += tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    down = down.to(hidden_ptr.dtype.element_ty).to(tl.float32)

    mixed_ptr += first_token * side
    offsets = row * side + channels[None, :]
    mask = is_token & is_channel[None, :]
    if HAS_STATE:
        state_ptr += first_token * side
        difference_ptr += first_token * side
        state = tl.load(state_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        gate = gate_of(gate_ptr, channels, is_channel, state_ptr.dtype.element_ty, SCALAR_GATE)
        store_mixed(down, state, gate, mixed_ptr, difference_ptr, offsets, mask)
    else:
        tl.store(mixed_ptr + offsets, down.to(mixed_ptr.dtype.element_ty), mask=mask)


def launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    gate: Tensor | None,
    mixed: Tensor,
    difference: Tensor | None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill `mixed` and `difference` [tokens, side], and `kept`: codes and exponents of H.

    All tensors contiguous, tokens flat; `state`, `gate` and `difference` go together.
    """
    require_triton(hidden, weight, mixed)
    num_tokens, hidden_size = hidden.shape
    side = weight.shape[0]
    if num_tokens == 0:
        return
    wide_groups = kept is not None and hidden.element_size() == 4
    block_tokens, block_side = BLOCK_TOKENS // 2 if wide_groups else BLOCK_TOKENS, _block_side(side)
    grid = (triton.cdiv(num_tokens, block_tokens) * triton.cdiv(side, block_side),)
    with on_device_of(hidden):
        ladder_down_kernel[grid](
            hidden,
            weight,
            weight if bias is None else bias,
            weight if state is None else state,
            weight if gate is None else gate,
            mixed,
            mixed if difference is None else difference,
            mixed if kept is None else kept[0].view(torch.uint8),
            mixed if kept is None else kept[1],
            num_tokens,
            side,
            hidden_size,
            HAS_BIAS=bias is not None,
            HAS_STATE=state is not None,
            SCALAR_GATE=gate is not None and gate.numel() == 1,
            KEEPS=kept is not None,
            BLOCK_TOKENS=block_tokens,
            BLOCK_SIDE=block_side,
            BLOCK_HIDDEN=BLOCK_BYTES // hidden.element_size() if kept is None else GROUP_SIZE,
            num_warps=NUM_WARPS,
        )


# ---------------------------------------------------------------- gate and sum alone


@triton.jit
def ladder_mix_kernel(
    down_ptr,
    state_ptr,
    gate_ptr,
    mixed_ptr,
    difference_ptr,
    num_tokens,
    side,
    SCALAR_GATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIDE: tl.constexpr,
):
    """Z and S - D of one tile."""
    channels = tl.program_id(1) * BLOCK_SIDE + tl.arange(0, BLOCK_SIDE)
    is_channel = channels < side
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    mask = (token < num_tokens)[:, None] & is_channel[None, :]
    offsets = token[:, None] * side + channels[None, :]
    down = tl.load(down_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    state = tl.load(state_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = gate_of(gate_ptr, channels, is_channel, state_ptr.dtype.element_ty, SCALAR_GATE)
    store_mixed(down, state, gate, mixed_ptr, difference_ptr, offsets, mask)


@triton.jit
def ladder_gradients_kernel(
    gradient_ptr,
    difference_ptr,
    gate_ptr,
    d_state_ptr,
    d_down_ptr,
    gate_sums_ptr,
    down_sums_ptr,
    num_tokens,
    side,
    strip,
    HAS_STATE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    SCALAR_GATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIDE: tl.constexpr,
):
    """dS, dD and a strip's sums by channel of dZ (S - D) and of dD [strips, side]."""
    channels = tl.program_id(1) * BLOCK_SIDE + tl.arange(0, BLOCK_SIDE)
    is_channel = channels < side
    first = tl.program_id(0) * strip
    last = tl.minimum(first + strip, num_tokens)
    gate = gate_of(gate_ptr, channels, is_channel, gradient_ptr.dtype.element_ty, SCALAR_GATE)
    gate_total = tl.zeros((BLOCK_TOKENS, BLOCK_SIDE), dtype=tl.float32)
    down_total = tl.zeros((BLOCK_TOKENS, BLOCK_SIDE), dtype=tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        mask = (token < last)[:, None] & is_channel[None, :]
        offsets = token.to(tl.int64)[:, None] * side + channels[None, :]
        gradient = tl.load(gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # rounded as the gradient is, then to the dtype of the weight
        down = (gradient * (1 - gate)).to(gradient_ptr.dtype.element_ty)
        down = down.to(d_down_ptr.dtype.element_ty)
        tl.store(d_down_ptr + offsets, down, mask=mask)
        if HAS_STATE:
            d_state = (gradient * gate).to(d_state_ptr.dtype.element_ty)
            tl.store(d_state_ptr + offsets, d_state, mask=mask)
        if HAS_SUMS:
            down_total += down.to(tl.float32)
        if HAS_GATE:
            difference = tl.load(difference_ptr + offsets, mask=mask, other=0.0)
            gate_total += gradient * difference.to(tl.float32)
    sums = tl.program_id(0).to(tl.int64) * side + channels
    if HAS_SUMS:
        tl.store(down_sums_ptr + sums, tl.sum(down_total, axis=0), mask=is_channel)
    if HAS_GATE:
        tl.store(gate_sums_ptr + sums, tl.sum(gate_total, axis=0), mask=is_channel)


def launch_mix(
    down: Tensor, state: Tensor, gate: Tensor, mixed: Tensor, difference: Tensor
) -> None:
    """Fill `mixed` and `difference` [tokens, side]; all tensors contiguous, tokens flat."""
    require_triton(down, state, gate, mixed, difference)
    num_tokens, side = state.shape
    if num_tokens == 0:
        return
    block_side = _block_side(side)
    grid = (triton.cdiv(num_tokens, MIX_TOKENS), triton.cdiv(side, block_side))
    with on_device_of(state):
        ladder_mix_kernel[grid](
            down,
            state,
            gate,
            mixed,
            difference,
            num_tokens,
            side,
            SCALAR_GATE=gate.numel() == 1,
            BLOCK_TOKENS=MIX_TOKENS,
            BLOCK_SIDE=block_side,
        )


def launch_gradients(
    gradient: Tensor,
    difference: Tensor | None,
    gate: Tensor,
    d_state: Tensor | None,
    d_down: Tensor,
    gate_sums: Tensor | None,
    down_sums: Tensor | None,
) -> None:
    """Fill dS, dD [tokens, side] and the sums [strips, side], fp32; None is left out.

    All tensors contiguous, tokens flat; `difference` and `gate_sums` go together.
    """
    require_triton(gradient, gate, d_down)
    num_tokens, side = gradient.shape
    strips, strip = strips_of(num_tokens)
    block_side = _block_side(side)
    with on_device_of(gradient):
        ladder_gradients_kernel[(strips, triton.cdiv(side, block_side))](
            gradient,
            gradient if difference is None else difference,
            gate,
            gradient if d_state is None else d_state,
            d_down,
            gradient if gate_sums is None else gate_sums,
            gradient if down_sums is None else down_sums,
            num_tokens,
            side,
            strip,
            HAS_STATE=d_state is not None,
            HAS_GATE=gate_sums is not None,
            HAS_SUMS=down_sums is not None,
            SCALAR_GATE=gate.numel() == 1,
            BLOCK_TOKENS=MIX_TOKENS,
            BLOCK_SIDE=block_side,
        )


def _block_side(side: int) -> int:
    width: int = min(BLOCK_SIDE, max(16, triton.next_power_of_2(side)))
    return width
