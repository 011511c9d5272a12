"""Weights in int8, one fp32 scale for each output of a linear layer.

For W [rows, columns] with `axis=0` (a row is an output: `nn.Linear`) or `axis=1` (a column is one:
transformers' `Conv1D`), i the index along that axis:

    scale_i = max |W_i| / 127,      code = round(W / scale_i) in -127 ... 127,      W ~ code * scale

The error is at most half a code, 1/254 of the output's largest weight. `int8_quantize` puts codes
and scales into one flat uint8 tensor: codes [rows * columns], then from a multiple of 16 bytes the
scales [rows] or [columns] in fp32.

Bytes: 1 + 4 / inputs an element. `int8_dequantize` makes one weight in the dtype asked for, which
is workspace, and for other dtypes than fp32 an fp32 piece of at most PIECE_ELEMENTS beside it.

Source: absmax quantisation by vectors, Dettmers et al. 2022 (LLM.int8()), arXiv 2208.07339, of the
weights alone: activations are not quantised, so that there are no outliers to set apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memrt.profiling.ledger import register_workspace

__all__ = ["int8_bytes", "int8_dequantize", "int8_quantize", "int8_quantize_reference"]

LARGEST_CODE = 127
ALIGNMENT = 16
# a bound on the fp32 temporaries, 16 MiB; not tuned
PIECE_ELEMENTS = 2**22


def int8_bytes(shape: Sequence[int], axis: int) -> int:
    """The bytes of a packed weight of `shape`."""
    return _start_of_scales(shape) + 4 * shape[axis]


def _start_of_scales(shape: Sequence[int]) -> int:
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


def _parts(packed: Tensor, shape: Sequence[int], axis: int) -> tuple[Tensor, Tensor]:
    """Views: codes int8 of `shape`, and fp32 scales [rows, 1] or [1, columns]."""
    if packed.dtype != torch.uint8 or packed.numel() != int8_bytes(shape, axis):
        raise ValueError(
            f"packed has {packed.numel()} elements of {packed.dtype}; a weight of {list(shape)} in "
            f"int8 has {int8_bytes(shape, axis)} of torch.uint8"
        )
    codes = packed[: math.prod(shape)].view(torch.int8).view(*shape)
    scales = packed[_start_of_scales(shape) :].view(torch.float32)
    return codes, scales.unsqueeze(1 - axis)


@torch.no_grad()
def int8_quantize_reference(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Codes (int8, of the weight's shape) and scales of the formula at the top of this file."""
    scales = weight.float().abs().amax(dim=1 - axis, keepdim=True) / LARGEST_CODE
    codes = torch.round(weight.float() / torch.where(scales > 0, scales, 1.0))
    return codes.to(torch.int8), scales


@torch.library.custom_op("memrt::int8_quantize", mutates_args=())
def int8_quantize(weight: Tensor, axis: int) -> Tensor:
    """The packed form, uint8 [int8_bytes], of a weight [rows, columns]."""
    _check(weight.shape, axis)
    packed = torch.zeros(int8_bytes(weight.shape, axis), dtype=torch.uint8, device=weight.device)
    codes, scales = _parts(packed, weight.shape, axis)
    room = weight.new_empty(_piece_elements(weight.shape), dtype=torch.float32)
    for rows in _pieces(weight.shape):
        found = _copied(weight[rows], room).abs_().amax(dim=1 - axis, keepdim=True)
        target = scales[rows] if axis == 0 else scales
        torch.maximum(target, found, out=target)
    scales /= LARGEST_CODE
    divisor = torch.where(scales > 0, scales, 1.0)
    for rows in _pieces(weight.shape):
        piece = _copied(weight[rows], room).div_(divisor[rows] if axis == 0 else divisor)
        codes[rows].copy_(piece.round_())
    return packed


def _copied(piece: Tensor, room: Tensor) -> Tensor:
    """A piece in fp32, in memory that is there."""
    return room[: piece.numel()].view(piece.shape).copy_(piece)


@int8_quantize.register_fake
def _(weight: Tensor, axis: int) -> Tensor:
    _check(weight.shape, axis)
    return weight.new_empty(int8_bytes(weight.shape, axis), dtype=torch.uint8)


@torch.library.custom_op("memrt::int8_dequantize", mutates_args=())
def int8_dequantize(packed: Tensor, shape: Sequence[int], axis: int, dtype: torch.dtype) -> Tensor:
    """The weight of `shape` in `dtype` that a packed one stands for; a new tensor."""
    _check(shape, axis)
    codes, scales = _parts(packed, shape, axis)
    weight = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    if dtype == torch.float32:
        return torch.mul(codes, scales, out=weight)
    for rows in _pieces(shape):
        weight[rows] = codes[rows] * (scales[rows] if axis == 0 else scales)
    return weight


@int8_dequantize.register_fake
def _(packed: Tensor, shape: Sequence[int], axis: int, dtype: torch.dtype) -> Tensor:
    _check(shape, axis)
    _parts(packed, shape, axis)
    return packed.new_empty(tuple(shape), dtype=dtype)


def quantize_workspace_bytes(weight: Tensor, axis: int) -> int:
    """An fp32 copy of a piece, and the scales twice."""
    return 4 * _piece_elements(weight.shape) + 8 * weight.shape[axis]


def dequantize_workspace_bytes(
    packed: Tensor, shape: Sequence[int], axis: int, dtype: torch.dtype
) -> int:
    """An fp32 piece of the weight, unless it is made in fp32."""
    return 0 if dtype == torch.float32 else 4 * _piece_elements(shape)


register_workspace("memrt::int8_quantize", quantize_workspace_bytes)
register_workspace("memrt::int8_dequantize", dequantize_workspace_bytes)


def _rows_of_piece(shape: Sequence[int]) -> int:
    return max(1, PIECE_ELEMENTS // max(1, shape[1]))


def _piece_elements(shape: Sequence[int]) -> int:
    return min(shape[0], _rows_of_piece(shape)) * shape[1]


def _pieces(shape: Sequence[int]) -> Iterator[slice]:
    rows = _rows_of_piece(shape)
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))


def _check(shape: Sequence[int], axis: int) -> None:
    if len(shape) != 2 or axis not in (0, 1):
        raise ValueError(
            f"shape={list(shape)}, axis={axis}: int8 weights are matrices, with axis 0 or 1"
        )
