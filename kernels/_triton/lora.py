"""`memrt.kernels.lora` in Triton: three products that read wide tensors as they came.

    down    low [tokens, r] = s · wide [tokens, n] W          H = X Aᵀ,  dH = s · dZ B
    up      out [tokens, n] = base + s · low Wᵀ               Z = Y + s · H Bᵀ,  dX = dH A
    outer   G [r, n] = s · lowᵀ wide, over tokens             dA = dHᵀ X,  dB = s · dZᵀ H

A wide tensor is cast in registers, the sum with Y and the cast to its dtype are in the epilogue.
`outer` splits the tokens among programs, whose parts are then added in one order, so that a
gradient has the same bits every time. Ranks beyond BLOCK_RANK take several tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.launching import on_device_of
from memrt.kernels.dispatch import require_triton
from memrt.kernels.lora import num_splits

BLOCK_RANK = 64
"""The most of a rank that one tile has."""
DOWN_TOKENS, UP_TOKENS = 32, 64
BLOCK_COLUMNS = 64
DOWN_BYTES, INNER_BYTES = 128, 64
"""What is multiplied at a time, in bytes of the product's dtype: of a wide row in `down`, of the
ranks in `up` and of the tokens in `outer`."""
NUM_WARPS = 8


@triton.jit
def lora_down_kernel(
    wide_ptr,
    weight_ptr,
    low_ptr,
    num_tokens,
    width,
    rank,
    scale,
    RANK_FIRST: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of s · wide W; W is [r, n] with `RANK_FIRST`, otherwise [n, r]."""
    kind = low_ptr.dtype.element_ty
    first_token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS
    row = tl.arange(0, BLOCK_TOKENS)[:, None]
    ranks = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)[None, :]
    is_token, is_rank = first_token + row < num_tokens, ranks < rank
    wide_ptr += first_token * width
    low = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), dtype=tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        inner = first + tl.arange(0, BLOCK_WIDTH)
        is_inner = inner < width
        x = tl.load(
            wide_ptr + (row * width + inner[None, :]),
            mask=is_token & is_inner[None, :],
            other=0.0,
        )
        offsets = ranks * width + inner[:, None] if RANK_FIRST else inner[:, None] * rank + ranks
        w = tl.load(weight_ptr + offsets, mask=is_rank & is_inner[:, None], other=0.0)
        low = tl.dot(x.to(kind), w.to(kind), low, input_precision=PRECISION)
    low_ptr += first_token * rank
    tl.store(low_ptr + (row * rank + ranks), (low * scale).to(kind), mask=is_token & is_rank)


@triton.jit
def lora_up_kernel(
    low_ptr,
    weight_ptr,
    base_ptr,
    out_ptr,
    num_tokens,
    width,
    rank,
    scale,
    HAS_BASE: tl.constexpr,
    RANK_FIRST: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of base + s · low Wᵀ, rounded once; W is [r, n] with `RANK_FIRST`, or [n, r]."""
    kind = low_ptr.dtype.element_ty
    tiles = tl.cdiv(width, BLOCK_WIDTH)
    program = tl.program_id(0)
    first_token = (program // tiles).to(tl.int64) * BLOCK_TOKENS
    row = tl.arange(0, BLOCK_TOKENS)[:, None]
    columns = (program % tiles) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    is_token, is_column = first_token + row < num_tokens, columns < width
    low_ptr += first_token * rank
    total = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        inner = first + tl.arange(0, BLOCK_RANK)
        is_inner = inner < rank
        low = tl.load(
            low_ptr + (row * rank + inner[None, :]), mask=is_token & is_inner[None, :], other=0.0
        )
        offsets = (
            inner[:, None] * width + columns if RANK_FIRST else columns * rank + inner[:, None]
        )
        w = tl.load(weight_ptr + offsets, mask=is_inner[:, None] & is_column, other=0.0)
        total = tl.dot(low, w.to(kind), total, input_precision=PRECISION)
    total *= scale
    offsets, mask = row * width + columns, is_token & is_column
    if HAS_BASE:
        base = tl.load(base_ptr + first_token * width + offsets, mask=mask, other=0.0)
        total += base.to(tl.float32)
    out_ptr += first_token * width
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_outer_kernel(
    low_ptr,
    wide_ptr,
    part_ptr,
    num_tokens,
    width,
    rank,
    tokens_a_split,
    scale,
    RANK_FIRST: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of s · lowᵀ wide over the tokens of a split, [r, n] with `RANK_FIRST`, or [n, r]."""
    kind = low_ptr.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    ranks = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    split = tl.program_id(2).to(tl.int64)
    is_column, is_rank = columns < width, ranks < rank
    first = split * tokens_a_split
    left = tl.minimum(num_tokens - first, tokens_a_split)
    low_ptr += first * rank
    wide_ptr += first * width
    total = tl.zeros((BLOCK_RANK, BLOCK_WIDTH), dtype=tl.float32)
    for done in range(0, left, BLOCK_TOKENS):
        row = tl.arange(0, BLOCK_TOKENS)
        is_token = done + row < left
        low = tl.load(
            low_ptr + (row[None, :] * rank + ranks[:, None]),
            mask=is_rank[:, None] & is_token[None, :],
            other=0.0,
        )
        x = tl.load(
            wide_ptr + (row[:, None] * width + columns),
            mask=is_token[:, None] & is_column,
            other=0.0,
        )
        total = tl.dot(low, x.to(kind), total, input_precision=PRECISION)
        low_ptr += BLOCK_TOKENS * rank
        wide_ptr += BLOCK_TOKENS * width
    part_ptr += split * width * rank
    offsets = ranks[:, None] * width + columns if RANK_FIRST else columns * rank + ranks[:, None]
    total = (total * scale).to(part_ptr.dtype.element_ty)
    tl.store(part_ptr + offsets, total, mask=is_rank[:, None] & is_column)


def launch_forward(
    output: Tensor, x: Tensor, a: Tensor, b: Tensor, hidden: Tensor, result: Tensor, scaling: float
) -> None:
    """Fill `hidden` H [tokens, r], in the product's dtype, and `result` Z [tokens, out].

    All tensors are contiguous, tokens flat.
    """
    require_triton(output, x, a, b, hidden, result)
    if x.shape[0] == 0:
        return
    with on_device_of(x):
        _down(x, a, hidden, 1.0, rank_first=True)
        _up(hidden, b, output, result, scaling, rank_first=False)


def launch_backward(
    gradient: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    hidden: Tensor,
    low: Tensor,
    x_gradient: Tensor | None,
    a_gradient: Tensor,
    b_gradient: Tensor,
    scaling: float,
) -> None:
    """Fill the gradients, and `hidden` H and `low` dH [tokens, r] in the product's dtype.

    All tensors are contiguous, tokens flat.
    """
    require_triton(gradient, x, a, b, hidden, low, a_gradient, b_gradient)
    if x.shape[0] == 0:
        a_gradient.zero_()
        b_gradient.zero_()
        return
    with on_device_of(x):
        _down(x, a, hidden, 1.0, rank_first=True)
        _down(gradient, b, low, scaling, rank_first=False)
        _outer(hidden, gradient, b_gradient, scaling, rank_first=False)
        _outer(low, x, a_gradient, 1.0, rank_first=True)
        if x_gradient is not None:
            _up(low, a, None, x_gradient, 1.0, rank_first=True)


def _block_rank(rank: int) -> int:
    return min(BLOCK_RANK, max(16, int(triton.next_power_of_2(rank))))


def _precision() -> str:
    """What PyTorch multiplies fp32 matrices with."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _down(wide: Tensor, weight: Tensor, low: Tensor, scale: float, *, rank_first: bool) -> None:
    (num_tokens, width), rank = wide.shape, low.shape[1]
    block = _block_rank(rank)
    lora_down_kernel[triton.cdiv(num_tokens, DOWN_TOKENS), triton.cdiv(rank, block)](
        wide,
        weight,
        low,
        num_tokens,
        width,
        rank,
        scale,
        RANK_FIRST=rank_first,
        BLOCK_TOKENS=DOWN_TOKENS,
        BLOCK_WIDTH=DOWN_BYTES // low.element_size(),
        BLOCK_RANK=block,
        PRECISION=_precision(),
        num_warps=NUM_WARPS,
    )


def _up(
    low: Tensor, weight: Tensor, base: Tensor | None, out: Tensor, scale: float, *, rank_first: bool
) -> None:
    (num_tokens, width), rank = out.shape, low.shape[1]
    lora_up_kernel[triton.cdiv(num_tokens, UP_TOKENS) * triton.cdiv(width, BLOCK_COLUMNS),](
        low,
        weight,
        out if base is None else base,
        out,
        num_tokens,
        width,
        rank,
        scale,
        HAS_BASE=base is not None,
        RANK_FIRST=rank_first,
        BLOCK_TOKENS=UP_TOKENS,
        BLOCK_WIDTH=BLOCK_COLUMNS,
        BLOCK_RANK=min(_block_rank(rank), INNER_BYTES // low.element_size()),
        PRECISION=_precision(),
        num_warps=NUM_WARPS,
    )


def _outer(low: Tensor, wide: Tensor, out: Tensor, scale: float, *, rank_first: bool) -> None:
    (num_tokens, width), rank = wide.shape, low.shape[1]
    block, splits = _block_rank(rank), num_splits(num_tokens)
    parts = out[None] if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    lora_outer_kernel[triton.cdiv(width, BLOCK_COLUMNS), triton.cdiv(rank, block), splits](
        low,
        wide,
        parts,
        num_tokens,
        width,
        rank,
        triton.cdiv(num_tokens, splits),
        scale,
        RANK_FIRST=rank_first,
        BLOCK_TOKENS=INNER_BYTES // low.element_size(),
        BLOCK_WIDTH=BLOCK_COLUMNS,
        BLOCK_RANK=block,
        PRECISION=_precision(),
        num_warps=NUM_WARPS,
    )
    if splits > 1:
        out.copy_(parts.sum(dim=0))
