"""NF4: four bits a weight, the scales of its blocks in eight.

A weight w [n], in row-major order, in blocks of 64 elements (the last one padded with zeros):

    scale = max |w| of the block,            code = the nearest of the 16 levels to w / scale
    offset = mean of the scales              (one for the weight)
    outer  = max |scale - offset| of 256 scales,
    scale_code = the nearest of `dynamic_map(signed=True)` to (scale - offset) / outer

    w ~ level[code] * (map[scale_code] * outer + offset)

`nf4_quantize` puts everything into one flat uint8 tensor, so that a quantised weight is one tensor
that is loaded, saved, moved and counted as any other. Its parts, each from a multiple of 16 bytes:

    codes, two a byte, the first in the high half   [32 * num_blocks]
    scale codes                                     [num_blocks]
    outer scales, fp32                              [ceil(num_blocks / 256)]
    offset, fp32                                    [1]

Bytes: 1/2 + 1/64 + 4/(64 * 256) = 0.516 an element, 4.127 bits. `nf4_dequantize` makes one weight
in the dtype that is asked for, which is workspace, and needs 4/64 bytes an element beside it.

The levels are the quantiles of a normal distribution, -1, 0 and 1 among them. Source: Dettmers et
al. 2023 (QLoRA), arXiv 2305.14314. The arithmetic is bitsandbytes', behind operators of ours; codes
and scales are those of its `quantize_4bit(..., quant_type="nf4", compress_statistics=True)`. It is
called with rows of 64: on CPUs with AVX-512, bitsandbytes 0.50 takes wrong scales for a width that
is a multiple of 16 and not of the block (relative error 0.62 instead of 0.09).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels.default_dtype import float32_by_default
from memrt.kernels.dynamic_map import dynamic_map
from memrt.kernels.quiet import without_hub_warning
from memrt.profiling.ledger import register_workspace

__all__ = [
    "BLOCK_SIZE",
    "LEVELS",
    "nf4_bytes",
    "nf4_dequantize",
    "nf4_dequantize_reference",
    "nf4_quantize",
    "nf4_quantize_reference",
]

BLOCK_SIZE = 64
OUTER_BLOCK_SIZE = 256
ALIGNMENT = 16
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# bitsandbytes on the CPU makes up to 15 bytes of temporaries an element, on CUDA its outputs only
CPU_PIECE_ELEMENTS = 2**18
CPU_SCRATCH_BYTES = 15
CUDA_PIECE_ELEMENTS = 2**24

# the fp32 values of bitsandbytes' table
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class _Parts(NamedTuple):
    codes: Tensor  # uint8 [32 * num_blocks]
    scale_codes: Tensor  # uint8 [num_blocks]
    outer_scales: Tensor  # fp32 [num_outer_blocks]
    offset: Tensor  # fp32 [1]


def _num_blocks(num_elements: int) -> int:
    return -(-num_elements // BLOCK_SIZE)


def _sizes(num_elements: int) -> tuple[int, int, int, int]:
    num_blocks = _num_blocks(num_elements)
    return num_blocks * BLOCK_SIZE // 2, num_blocks, 4 * -(-num_blocks // OUTER_BLOCK_SIZE), 4


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def nf4_bytes(num_elements: int) -> int:
    """The bytes of a quantised weight of `num_elements`."""
    return sum(_aligned(size) for size in _sizes(num_elements))


def _parts(packed: Tensor, num_elements: int) -> _Parts:
    """Views of the parts of a packed weight."""
    if packed.dtype != torch.uint8 or packed.numel() != nf4_bytes(num_elements):
        raise ValueError(
            f"packed has {packed.numel()} elements of {packed.dtype}; a weight of {num_elements} "
            f"elements in NF4 has {nf4_bytes(num_elements)} of torch.uint8"
        )
    views, start = [], 0
    for size in _sizes(num_elements):
        views.append(packed[start : start + size])
        start += _aligned(size)
    codes, scale_codes, outer, offset = views
    return _Parts(codes, scale_codes, outer.view(torch.float32), offset.view(torch.float32))


# ---------------------------------------------------------------- reference


@torch.no_grad()
def nf4_quantize_reference(weight: Tensor) -> Tensor:
    """The formula at the top of this file in plain PyTorch."""
    num_elements = weight.numel()
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    padding = _num_blocks(num_elements) * BLOCK_SIZE - num_elements
    blocks = functional.pad(weight.float().flatten(), (0, padding)).view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(dim=1)  # [num_blocks]
    normalised = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    codes = torch.searchsorted((levels[1:] + levels[:-1]) / 2, normalised).to(torch.uint8)

    offset = scales.mean()
    padding = -(-len(scales) // OUTER_BLOCK_SIZE) * OUTER_BLOCK_SIZE - len(scales)
    centred = functional.pad(scales - offset, (0, padding)).view(-1, OUTER_BLOCK_SIZE)
    outer = centred.abs().amax(dim=1)
    outer_map = torch.tensor(dynamic_map(signed=True), dtype=torch.float32)
    normalised = centred / torch.where(outer > 0, outer, 1.0)[:, None]
    scale_codes = torch.searchsorted((outer_map[1:] + outer_map[:-1]) / 2, normalised)

    packed = torch.zeros(nf4_bytes(num_elements), dtype=torch.uint8)
    parts = _parts(packed, num_elements)
    parts.codes.copy_((codes.view(-1, 2)[:, 0] << 4) | codes.view(-1, 2)[:, 1])
    parts.scale_codes.copy_(scale_codes.flatten()[: len(scales)])
    parts.outer_scales.copy_(outer)
    parts.offset.copy_(offset)
    return packed


@torch.no_grad()
def nf4_dequantize_reference(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight of `shape` that a packed one stands for, in plain PyTorch."""
    num_elements = math.prod(shape)
    parts = _parts(packed, num_elements)
    outer = parts.outer_scales.repeat_interleave(OUTER_BLOCK_SIZE)[: len(parts.scale_codes)]
    scales = (
        torch.tensor(dynamic_map(signed=True), dtype=torch.float32)[parts.scale_codes.int()] * outer
        + parts.offset
    )
    codes = torch.stack([parts.codes >> 4, parts.codes & 15], dim=1).flatten()
    values = torch.tensor(LEVELS, dtype=torch.float32)[codes.int()] * scales.repeat_interleave(
        BLOCK_SIZE
    )
    return values[:num_elements].to(dtype).view(*shape)


# ---------------------------------------------------------------- operators


@torch.library.custom_op("memrt::nf4_quantize", mutates_args=())
def nf4_quantize(weight: Tensor) -> Tensor:
    """The packed NF4 form, uint8 [nf4_bytes(n)], of a weight of n elements (fp32, bf16, fp16)."""
    _check_dtype(weight.dtype)
    with float32_by_default():
        return _quantize(weight)


def _quantize(weight: Tensor) -> Tensor:
    num_elements = weight.numel()
    # zeros: the bytes between the parts are part of what is saved and compared
    packed = torch.zeros(nf4_bytes(num_elements), dtype=torch.uint8, device=weight.device)
    if not num_elements:
        return packed
    bitsandbytes = _operators()
    parts = _parts(packed, num_elements)
    flat = weight.contiguous().view(-1)
    scales = torch.empty(_num_blocks(num_elements), dtype=torch.float32, device=weight.device)
    size = _piece_elements(weight.device.type)
    for first in range(0, num_elements, size):
        piece = flat[first : first + size]
        piece = functional.pad(piece, (0, -len(piece) % BLOCK_SIZE)) if len(piece) % 64 else piece
        codes, found = bitsandbytes.quantize_4bit(
            piece.view(-1, BLOCK_SIZE), BLOCK_SIZE, "nf4", torch.uint8
        )
        parts.codes[first // 2 : first // 2 + codes.numel()] = codes.view(-1)
        scales[first // BLOCK_SIZE : first // BLOCK_SIZE + len(found)] = found
    parts.offset.copy_(scales.mean())
    scales -= parts.offset
    codes, outer = bitsandbytes.quantize_blockwise(
        scales, _outer_map(weight.device), OUTER_BLOCK_SIZE
    )
    parts.scale_codes.copy_(codes)
    parts.outer_scales.copy_(outer)
    return packed


@nf4_quantize.register_fake
def _(weight: Tensor) -> Tensor:
    _check_dtype(weight.dtype)
    return weight.new_empty(nf4_bytes(weight.numel()), dtype=torch.uint8)


@torch.library.custom_op("memrt::nf4_dequantize", mutates_args=())
def nf4_dequantize(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight of `shape` in `dtype` that a packed one stands for; a new tensor."""
    _check_dtype(dtype)
    with float32_by_default():
        return _dequantize(packed, shape, dtype)


def _dequantize(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    num_elements = math.prod(shape)
    parts = _parts(packed, num_elements)
    if not num_elements:
        return torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    bitsandbytes = _operators()
    scales = bitsandbytes.dequantize_blockwise(
        parts.scale_codes,
        parts.outer_scales,
        _outer_map(packed.device),
        OUTER_BLOCK_SIZE,
        torch.float32,
    )
    scales += parts.offset
    blocks = bitsandbytes.dequantize_4bit(
        parts.codes.view(-1, 1), scales, BLOCK_SIZE, "nf4", [len(scales), BLOCK_SIZE], dtype
    )
    if num_elements == blocks.numel():
        return blocks.view(tuple(shape))  # type: ignore[no-any-return]
    return blocks.view(-1)[:num_elements].clone().view(tuple(shape))  # type: ignore[no-any-return]


@nf4_dequantize.register_fake
def _(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    _check_dtype(dtype)
    _parts(packed, math.prod(shape))
    return packed.new_empty(tuple(shape), dtype=dtype)


def quantize_workspace_bytes(weight: Tensor) -> int:
    """Temporaries inside `nf4_quantize`: scales in fp32, and those of one piece."""
    num_elements = weight.numel()
    num_blocks = _num_blocks(num_elements)
    size = min(num_elements + -num_elements % BLOCK_SIZE, _piece_elements(weight.device.type))
    copy = 0 if weight.is_contiguous() else weight.element_size() * num_elements
    padded = weight.element_size() * size if num_elements % BLOCK_SIZE else 0
    if weight.device.type == "cpu":
        piece = CPU_SCRATCH_BYTES * size
    else:
        piece = size // 2 + 4 * (size // BLOCK_SIZE)
    outer = num_blocks + 4 * -(-num_blocks // OUTER_BLOCK_SIZE)
    return copy + 4 * num_blocks + max(piece + padded, outer)


def dequantize_workspace_bytes(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Temporaries inside `nf4_dequantize`: scales in fp32, a copy when the last block is ragged."""
    num_elements = math.prod(shape)
    num_blocks = _num_blocks(num_elements)
    ragged = dtype.itemsize * num_blocks * BLOCK_SIZE if num_elements % BLOCK_SIZE else 0
    return 4 * num_blocks + ragged


register_workspace("memrt::nf4_quantize", quantize_workspace_bytes)
register_workspace("memrt::nf4_dequantize", dequantize_workspace_bytes)


def _piece_elements(device_type: str) -> int:
    return CPU_PIECE_ELEMENTS if device_type == "cpu" else CUDA_PIECE_ELEMENTS


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype={dtype}: NF4 takes and makes fp32, bf16 and fp16; cast to one")


@cache
def _outer_map(device: torch.device) -> Tensor:
    return torch.tensor(dynamic_map(signed=True), dtype=torch.float32, device=device)


def _operators() -> Any:
    try:
        with without_hub_warning(), float32_by_default():
            import bitsandbytes  # noqa: F401 - registers torch.ops.bitsandbytes
    except ImportError as error:
        raise ImportError(
            "NF4 is computed by bitsandbytes, which cannot be imported; "
            "run: pip install bitsandbytes, or use the strategy int8"
        ) from error
    return torch.ops.bitsandbytes
