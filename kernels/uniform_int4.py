"""Uniform four-bit codes in groups of 256, for matrices that are multiplied by and not updated.

For the elements x of a group, low and high the least and the largest of them:

    minimum = low rounded down to bf16,   scale = (high - minimum) / 15 rounded up to bf16
    code = round((x - minimum) / scale) in 0 ... 15,      x' = minimum + code * scale

so |x - x'| <= scale / 2 for every x: groups of one sign, constant ones and zeros too. (A zero point
among the codes, as Q-GaLore's, cannot hold a group that does not contain zero.) Two codes share a
byte, the element with the even index in the lower half; the last group may be short, and is filled
with its last element. A group with a NaN is restored as NaN, one with an infinity as what is not
finite.

Bytes: 1/2 + 4/256 an element. Traffic on CUDA, where each way is one pass of one Triton kernel:
4.52 an element. Temporaries: none on CUDA; on the CPU up to 10 bytes an element of a piece of 2^16
to quantise, 6 to restore; either way a copy of what is not contiguous. Codes, scales, minima and
restored elements have the same bits eagerly, compiled and in Triton, but for a NaN's. To restore is
not compiled: it is no faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memrt.kernels.compiled import CompiledFunction
from memrt.kernels.dispatch import uses_triton
from memrt.profiling.ledger import register_workspace

__all__ = [
    "GROUP",
    "PackedInt4",
    "dequantize_workspace_bytes",
    "int4_dequantize",
    "int4_dequantize_reference",
    "int4_quantize",
    "int4_quantize_reference",
    "int4_shapes",
    "quantize_workspace_bytes",
]

GROUP = 256
LARGEST_CODE = 15
# more than bf16's rounding to the nearest, 2^-9, can take back
MARGIN = 2.0**-7
PIECE_ELEMENTS = 2**16  # on the CPU: caches hold what a piece needs
QUANTIZE_SCRATCH_BYTES = 10  # 9.3 were seen of a piece that is filled up, 5.1 of whole groups
DEQUANTIZE_SCRATCH_BYTES = 6  # 5.7 and 5.1
# Whole pieces of a tensor that is worth some seconds of compiling are compiled, the rest is eager.
COMPILED_FROM_ELEMENTS = 2**20


class PackedInt4(NamedTuple):
    """Codes, two a byte, and a scale and a minimum for each group."""

    codes: Tensor  # uint8 [ceil(elements / 2)]
    scales: Tensor  # bf16 [groups]
    minima: Tensor  # bf16 [groups]


def int4_shapes(num_elements: int) -> tuple[tuple[int], tuple[int], tuple[int]]:
    """The shapes of the three tensors."""
    groups = -(-num_elements // GROUP)
    return (-(-num_elements // 2),), (groups,), (groups,)


@torch.no_grad()
def int4_quantize_reference(groups: Tensor) -> PackedInt4:
    """The formula in plain PyTorch, of fp32 [groups, 256]; codes [groups, 128]."""
    low, high = groups.aminmax(dim=1)
    minima = _rounded(low - low.abs() * MARGIN)
    scales = _rounded((high - minima) / LARGEST_CODE * (1.0 + MARGIN))
    steps = torch.where(scales > 0, scales, 1.0)
    shares = (groups - minima[:, None]).div_(steps[:, None])
    codes = shares.round_().clamp_(0, LARGEST_CODE).nan_to_num_(nan=0.0).to(torch.uint8)
    del shares
    packed = (codes[:, 1::2] << 4).bitwise_or_(codes[:, ::2])
    return PackedInt4(packed, scales.bfloat16(), minima.bfloat16())


def _rounded(x: Tensor) -> Tensor:
    """x to the nearest number of bf16, in fp32: compiled code leaves out a cast there and back."""
    word = x.view(torch.int32)
    nearest = (word + 0x7FFF + ((word >> 16) & 1)) & -65536
    return torch.where(x.isnan(), x, nearest.view(torch.float32))


@torch.no_grad()
def int4_dequantize_reference(packed: PackedInt4) -> Tensor:
    """Fp32 [groups, 256] of codes [groups, 128]."""
    codes = torch.stack([packed.codes & 15, packed.codes >> 4], dim=2).view(-1, GROUP)
    return codes.float().mul_(packed.scales.float()[:, None]).add_(packed.minima.float()[:, None])


def int4_quantize(values: Tensor) -> PackedInt4:
    """Quantise an fp32 tensor of any shape, in row-major order."""
    return PackedInt4(*_quantize(values))


def int4_dequantize(packed: PackedInt4, shape: Sequence[int]) -> Tensor:
    """The fp32 tensor of this shape that the codes stand for; a new one."""
    restored: Tensor = _dequantize(*packed, shape)
    return restored


# ---------------------------------------------------------------- operators


@torch.library.custom_op("memrt::uniform_int4_quantize", mutates_args=())
def _quantize(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed = _empty(values)
    flat = values.contiguous().view(-1)
    if uses_triton(values):
        from memrt.kernels._triton.uniform_int4 import launch_quantize

        launch_quantize(flat, *packed)
        return packed
    for piece in _pieces(flat, packed):
        whole = flat.numel() >= COMPILED_FROM_ELEMENTS and piece[0].numel() == PIECE_ELEMENTS
        if not (whole and _compiled_quantize_piece(*piece)):
            _quantize_piece(*piece)
    return packed


@_quantize.register_fake
def _(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(values)


@torch.library.custom_op("memrt::uniform_int4_dequantize", mutates_args=())
def _dequantize(codes: Tensor, scales: Tensor, minima: Tensor, shape: Sequence[int]) -> Tensor:
    _check(codes, scales, minima, shape)
    values = torch.empty(tuple(shape), dtype=torch.float32, device=codes.device)
    if uses_triton(codes):
        from memrt.kernels._triton.uniform_int4 import launch_dequantize

        launch_dequantize(values, codes, scales, minima)
        return values
    for piece in _pieces(values.view(-1), (codes, scales, minima)):
        _dequantize_piece(*piece)
    return values


@_dequantize.register_fake
def _(codes: Tensor, scales: Tensor, minima: Tensor, shape: Sequence[int]) -> Tensor:
    _check(codes, scales, minima, shape)
    return torch.empty(tuple(shape), dtype=torch.float32, device=codes.device)


def quantize_workspace_bytes(values: Tensor) -> int:
    """The most bytes of temporaries that are alive at once inside `int4_quantize`."""
    copy = 0 if values.is_contiguous() else 4 * values.numel()
    return copy + _scratch_bytes(values, values.numel(), QUANTIZE_SCRATCH_BYTES)


def dequantize_workspace_bytes(
    codes: Tensor, scales: Tensor, minima: Tensor, shape: Sequence[int]
) -> int:
    """The most bytes of temporaries that are alive at once inside `int4_dequantize`."""
    return _scratch_bytes(codes, math.prod(shape), DEQUANTIZE_SCRATCH_BYTES)


register_workspace("memrt::uniform_int4_quantize", quantize_workspace_bytes)
register_workspace("memrt::uniform_int4_dequantize", dequantize_workspace_bytes)


# ---------------------------------------------------------------- on the CPU


def _pieces(
    flat: Tensor, packed: tuple[Tensor, Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Views of the elements, codes, scales and minima of every piece."""
    codes, scales, minima = packed
    for start in range(0, flat.numel(), PIECE_ELEMENTS):
        stop = min(start + PIECE_ELEMENTS, flat.numel())
        groups = slice(start // GROUP, -(-stop // GROUP))
        part = codes[start // 2 : -(-stop // 2)]
        yield flat[start:stop], part, scales[groups], minima[groups]


def _quantize_piece(values: Tensor, codes: Tensor, scales: Tensor, minima: Tensor) -> None:
    """Of neighbouring elements from a group's first on, into the other three."""
    missing = scales.numel() * GROUP - values.numel()
    if missing:
        values = torch.cat([values, values[-1:].expand(missing)])
    found = int4_quantize_reference(values.view(-1, GROUP))
    codes.copy_(found.codes.view(-1)[: codes.numel()])
    scales.copy_(found.scales)
    minima.copy_(found.minima)


def _dequantize_piece(values: Tensor, codes: Tensor, scales: Tensor, minima: Tensor) -> None:
    """Of neighbouring elements from a group's first on, into the first."""
    missing = scales.numel() * (GROUP // 2) - codes.numel()
    if missing:
        codes = torch.cat([codes, codes.new_zeros(missing)])
    found = int4_dequantize_reference(PackedInt4(codes.view(-1, GROUP // 2), scales, minima))
    values.copy_(found.view(-1)[: values.numel()])


_compiled_quantize_piece = CompiledFunction(_quantize_piece)


def _scratch_bytes(tensor: Tensor, num_elements: int, each: int) -> int:
    if uses_triton(tensor):
        return 0
    return each * GROUP * -(-min(num_elements, PIECE_ELEMENTS) // GROUP)


# ---------------------------------------------------------------- checks


def _empty(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the codes of `values`."""
    if values.dtype != torch.float32:
        raise ValueError(
            f"values is {values.dtype}; four-bit codes are made of fp32: call .float()"
        )
    codes, scales, minima = int4_shapes(values.numel())
    return (
        values.new_empty(codes, dtype=torch.uint8),
        values.new_empty(scales, dtype=torch.bfloat16),
        values.new_empty(minima, dtype=torch.bfloat16),
    )


def _check(codes: Tensor, scales: Tensor, minima: Tensor, shape: Sequence[int]) -> None:
    dtypes = (torch.uint8, torch.bfloat16, torch.bfloat16)
    expected = int4_shapes(math.prod(shape))
    for name, tensor, dtype, size in zip(
        PackedInt4._fields, (codes, scales, minima), dtypes, expected, strict=True
    ):
        if tensor.dtype != dtype or tensor.shape != size or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {size[0]} contiguous elements of {dtype} for a matrix of "
                f"{list(shape)}, got {list(tensor.shape)} of {tensor.dtype}"
            )
