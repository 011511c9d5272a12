"""`memrt.kernels.adamw_fp8_foreach` in Triton: the pass of `adamw_fp8` over many parameters.

Addresses, sizes, step counts and rounding keys lie in a table on the device, which is made on the
host, in pinned memory, and copied without waiting: torch's allocator of pinned memory keeps it
until the copy is done. A program finds its parameter by counting the first programs that do not lie
beyond it, and takes BLOCKS blocks of it. It reads the row again for each block: kept in registers,
what it reads would leave room for fewer programs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels import adamw_fp8_foreach as form
from memrt.kernels._triton.adamw_fp8 import GROUPS, NUM_WARPS, One, launch, step_groups
from memrt.kernels._triton.launching import on_device_of
from memrt.kernels.dispatch import require_triton
from memrt.kernels.expanded_fp8 import GROUP_SIZE, decoding_table, num_groups

__all__ = ["One", "launch_foreach"]

BLOCKS = 4
ALIGNMENT = 16
MAX_TENSORS = tl.constexpr(form.MAX_TENSORS)
COLUMNS = tl.constexpr(form.TABLE_COLUMNS)


class Kind(NamedTuple):
    """What the parameters of one launch have in common."""

    device: torch.device
    dtype: torch.dtype
    gradient_dtype: torch.dtype
    is_stochastic: bool
    is_aligned: bool
    """Whether 16 bytes are read at once: neither addresses nor sizes forbid it."""


@triton.jit
def place_at(entry, like_ptr, ALIGNED: tl.constexpr):
    """The address that lies there, of elements like those of `like_ptr`."""
    place = tl.load(entry).to(like_ptr.dtype)
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    return place


@triton.jit
def adamw_fp8_foreach_kernel(
    tensors_ptr,
    p_ptr,
    g_ptr,
    codes_ptr,
    largest_ptr,
    table_ptr,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The same on `BLOCKS` blocks of the parameter that this program is for.

    tensors_ptr: int64, of `_table`. The four after it are read for their dtypes alone.
    """
    program = tl.program_id(0)
    firsts = tl.load(tensors_ptr + tl.arange(0, MAX_TENSORS))
    index = tl.sum((firsts <= program).to(tl.int32), axis=0) - 1
    row = tensors_ptr + MAX_TENSORS + index * COLUMNS
    first = (program - tl.load(tensors_ptr + index)) * (GROUPS * BLOCKS)
    for block in range(BLOCKS):
        num_elements = tl.load(row + 8)
        if ALIGNED:
            num_elements = tl.multiple_of(num_elements, 16)
        step_groups(
            first + block * GROUPS + tl.arange(0, GROUPS)[:, None],
            place_at(row, p_ptr, ALIGNED),
            place_at(row + 1, g_ptr, ALIGNED),
            place_at(row + 2, codes_ptr, ALIGNED),
            place_at(row + 3, codes_ptr, ALIGNED),
            place_at(row + 4, largest_ptr, False),
            place_at(row + 5, largest_ptr, False),
            place_at(row + 6, codes_ptr, False),
            place_at(row + 7, codes_ptr, False),
            table_ptr,
            num_elements,
            decay,
            tl.load(row + 9).to(tl.int32).to(tl.float32, bitcast=True),
            beta1,
            rest1,
            beta2,
            rest2,
            tl.load(row + 10).to(tl.int32).to(tl.float32, bitcast=True),
            eps,
            tl.load(row + 11).to(tl.int32),
            tl.load(row + 12).to(tl.int32),
            tl.load(row + 13).to(tl.int32),
            STOCHASTIC,
            GROUP_SIZE,
        )


def launch_foreach(many: Sequence[One]) -> None:
    """One launch for every kind of parameters, and for each `MAX_TENSORS` of them.

    Their scalars differ in what depends on the step alone.
    """
    kinds: dict[Kind, list[One]] = {}
    for one in many:
        if one.parameter.numel():
            kinds.setdefault(_kind_of(one), []).append(one)
    for kind, ones in kinds.items():
        for start in range(0, len(ones), form.MAX_TENSORS):
            some = ones[start : start + form.MAX_TENSORS]
            if len(some) == 1:
                launch(some[0])
            else:
                _launch_some(kind, some)


def _kind_of(one: One) -> Kind:
    parameter, gradient = one.parameter, one.gradient
    read_at_once = (parameter, gradient, *one.state[:2])
    is_aligned = not any(
        tensor.data_ptr() % ALIGNMENT or tensor.numel() % ALIGNMENT for tensor in read_at_once
    )
    is_stochastic = one.rounding_key is not None
    return Kind(parameter.device, parameter.dtype, gradient.dtype, is_stochastic, is_aligned)


def _launch_some(kind: Kind, ones: Sequence[One]) -> None:
    require_triton(*(t for one in ones for t in (one.parameter, one.gradient, *one.state)))
    table, num_programs = _table(ones)
    decay, _, beta1, rest1, beta2, rest2, _, eps = ones[0].scalars
    with on_device_of(ones[0].parameter):
        adamw_fp8_foreach_kernel[(num_programs,)](
            table.to(kind.device, non_blocking=True),
            ones[0].parameter,
            ones[0].gradient,
            ones[0].state[0],
            ones[0].state[2],
            decoding_table(kind.device),
            decay,
            beta1,
            rest1,
            beta2,
            rest2,
            eps,
            STOCHASTIC=kind.is_stochastic,
            ALIGNED=kind.is_aligned,
            GROUP_SIZE=GROUP_SIZE,
            GROUPS=GROUPS,
            BLOCKS=BLOCKS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # the reference's bits
        )


def _table(ones: Sequence[One]) -> tuple[Tensor, int]:
    """The first program of each, filled up with numbers that none has, then a row for each."""
    firsts: list[int] = []
    rows: list[int] = []
    num_programs = 0
    for one in ones:
        firsts.append(num_programs)
        num_programs += triton.cdiv(num_groups(one.parameter.numel()), GROUPS * BLOCKS)
        rows.extend(_row(one))
    firsts += [torch.iinfo(torch.int64).max] * (form.MAX_TENSORS - len(ones))
    pinned = ones[0].parameter.is_cuda
    numbers = torch.tensor(firsts + rows, dtype=torch.int64, device="cpu", pin_memory=pinned)
    return numbers, num_programs


def _row(one: One) -> Iterator[int]:
    """In the order in which the kernel reads them; numbers of fp32 as their bits."""
    for tensor in (one.parameter, one.gradient, *one.state):
        yield tensor.data_ptr()
    yield one.parameter.numel()
    for number in (one.scalars[1], one.scalars[6]):
        yield int.from_bytes(struct.pack("<f", number), "little", signed=True)
    yield from one.rounding_key or (0, 0)
    yield one.step
