"""One AdamW step on moments kept in 8 bits, block by block.

Formula, for a parameter p [n], gradient g [n], step t = 1, 2, ... and moments m, v [n], in fp32:

    m = map_m[codes_m] * scales_m,        v = map_v[codes_v] * scales_v      (one scale a block)
    p <- p * (1 - lr * weight_decay)                                         (torch's order)
    m <- beta1 * m + (1 - beta1) * g,     v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)    (unrounded moments)
    scale = max |m| of the block,         code = the nearest of the map's 256 values to m / scale

with the maps of `memrt.kernels.dynamic_map`, and blocks of 256 elements in row-major order, the
last one ragged. The codes of v are then raised to at least 1: code 0 stands for exactly zero, and a
v that is rounded to zero under an m that is not makes the next update m / eps.

Bytes: 2 for the codes and 8 / 256 for the scales of every element, 2.03 instead of 8; the two maps
are 1 KiB each, once a device. Temporaries are bounded: `workspace_bytes` says how many. In fp32 on
CUDA there are none. bf16 and fp16 parameters are updated through an fp32 copy of at most 4 Mi
elements at a time, so that decay and update are rounded once; without that, bf16 loses every decay
with lr * weight_decay < 2^-9.

The arithmetic is bitsandbytes' (Dettmers et al., arXiv 2110.02861), behind an operator of ours, so
that ledger and plan see plain tensors only. Its backends differ: on the CPU codes come from a table
of 2^16 bins, so that a value may take a code that is up to 2^-15 of the block's scale farther away
than the nearest one, and v never falls below 1.6e-5 of it; CUDA takes the nearest. Decay is ours,
because bitsandbytes decays before the update on the CPU and after it on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memrt.kernels.default_dtype import float32_by_default
from memrt.kernels.dynamic_map import (
    BLOCK_SIZE,
    dequantize_blockwise_reference,
    num_blocks,
    quantize_blockwise_reference,
)
from memrt.kernels.quiet import without_hub_warning
from memrt.kernels.stochastic_rounding import PIECE_ELEMENTS as ROUNDING_ELEMENTS
from memrt.kernels.stochastic_rounding import SCRATCH_BYTES as ROUNDING_BYTES
from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.profiling.ledger import register_workspace

__all__ = ["adamw_int8", "adamw_int8_reference", "workspace_bytes"]

# fp32 copies of half-precision tensors are made for so many elements at a time: 32 MiB
PIECE_ELEMENTS = 2**22
# bitsandbytes on the CPU makes five fp32 temporaries of what it is given. Of 2^14 ... 2^23, 2^18
# was the fastest (8 Mi elements, 2 AMD AVX-512 cores, bitsandbytes 0.50.2: 86 ms, undivided 121 ms)
CPU_PIECE_ELEMENTS = 2**18
CPU_SCRATCH_BYTES = 20
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def adamw_int8_reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_scales: Tensor,
    exp_avg_sq_scales: Tensor,
    exp_avg_map: Tensor,
    exp_avg_sq_map: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The formula at the top of this file in plain PyTorch, in place. For reading and for tests."""
    p = parameter.float().flatten()
    g = gradient.float().flatten()
    m = dequantize_blockwise_reference(exp_avg_codes.flatten(), exp_avg_scales, exp_avg_map)
    v = dequantize_blockwise_reference(
        exp_avg_sq_codes.flatten(), exp_avg_sq_scales, exp_avg_sq_map
    )
    t = int(step)

    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t) ** 0.5 + eps)

    parameter.copy_(p.view(parameter.shape))
    codes, scales = quantize_blockwise_reference(m, exp_avg_map)
    exp_avg_codes.copy_(codes.view(exp_avg_codes.shape))
    exp_avg_scales.copy_(scales)
    codes, scales = quantize_blockwise_reference(v, exp_avg_sq_map)
    exp_avg_sq_codes.copy_(codes.view(exp_avg_sq_codes.shape)).clamp_(min=1)
    exp_avg_sq_scales.copy_(scales)


# ---------------------------------------------------------------- operator


@torch.library.custom_op(
    "memrt::adamw_int8",
    mutates_args=(
        "parameter",
        "exp_avg_codes",
        "exp_avg_sq_codes",
        "exp_avg_scales",
        "exp_avg_sq_scales",
    ),
)
def adamw_int8(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_scales: Tensor,
    exp_avg_sq_scales: Tensor,
    exp_avg_map: Tensor,
    exp_avg_sq_map: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_key: Sequence[int] | None = None,
) -> None:
    """One AdamW step, in place on the parameter and its 8-bit moments.

    parameter, gradient: same shape; fp32, bf16 or fp16. exp_avg_codes, exp_avg_sq_codes: uint8,
    contiguous, as many elements. exp_avg_scales, exp_avg_sq_scales: fp32 [num_blocks]. exp_avg_map,
    exp_avg_sq_map: fp32 [256], `dynamic_map(signed=True)` and `dynamic_map(signed=False)`. step:
    the number of this step, from 1; best on the host, for its value is read. rounding_key: of
    `stochastic_rounding.rounding_key`, to round a bf16 parameter stochastically.
    """
    _check(parameter, gradient, exp_avg_codes, exp_avg_sq_codes, exp_avg_scales, exp_avg_sq_scales)
    update = partial(
        _bitsandbytes_update(),
        "adam",
        beta1=beta1,
        beta2=beta2,
        beta3=0.0,
        alpha=0.0,
        eps=eps,
        step=int(step.item()),
        lr=lr,
        qmap1=exp_avg_map,
        qmap2=exp_avg_sq_map,
        weight_decay=0.0,
    )
    weight = parameter.contiguous().view(-1)
    grad = gradient.contiguous().view(-1)
    codes = (exp_avg_codes.view(-1), exp_avg_sq_codes.view(-1))
    scales = (exp_avg_scales, exp_avg_sq_scales)
    rounding = _rounding(parameter, rounding_key, step)
    with float32_by_default():
        for piece in _pieces(0, weight.numel(), PIECE_ELEMENTS):
            _update_piece(
                update, piece, weight, grad, codes, scales, 1 - lr * weight_decay, rounding
            )
    if not parameter.is_contiguous():
        parameter.copy_(weight.view(parameter.shape))
    exp_avg_sq_codes.clamp_(min=1)


def _update_piece(
    update: Callable[..., None],
    piece: slice,
    weight: Tensor,
    gradient: Tensor,
    codes: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor],
    decay: float,
    rounding: Rounding | None,
) -> None:
    weight32, gradient32 = weight[piece].float(), gradient[piece].float()
    if decay != 1:
        weight32.mul_(decay)
    size = CPU_PIECE_ELEMENTS if weight.device.type == "cpu" else PIECE_ELEMENTS
    for part in _pieces(piece.start, piece.stop, size):
        local = slice(part.start - piece.start, part.stop - piece.start)
        blocks = slice(part.start // BLOCK_SIZE, num_blocks(part.stop))
        update(
            g=gradient32[local],
            p=weight32[local],
            state1=codes[0][part],
            state2=codes[1][part],
            absmax1=scales[0][blocks],
            absmax2=scales[1][blocks],
        )
    if rounding is not None:
        stochastic_copy_(weight[piece], weight32, rounding=rounding, first_index=piece.start)
    elif weight.dtype != torch.float32:
        weight[piece].copy_(weight32)


def _rounding(
    parameter: Tensor, rounding_key: Sequence[int] | None, step: Tensor
) -> Rounding | None:
    if rounding_key is None or parameter.dtype is not torch.bfloat16:
        return None
    first, second = rounding_key
    return Rounding((first, second), step)


@adamw_int8.register_fake
def _(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_scales: Tensor,
    exp_avg_sq_scales: Tensor,
    exp_avg_map: Tensor,
    exp_avg_sq_map: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_key: Sequence[int] | None = None,
) -> None:
    _check(parameter, gradient, exp_avg_codes, exp_avg_sq_codes, exp_avg_scales, exp_avg_sq_scales)


def workspace_bytes(
    parameter: Tensor, gradient: Tensor, *others: Any, rounding_key: object = None, **_: Any
) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    num_elements = parameter.numel()
    num_bytes = 0
    for tensor in (parameter, gradient):
        if not tensor.is_contiguous():
            num_bytes += tensor.element_size() * num_elements
        if tensor.dtype != torch.float32:
            num_bytes += 4 * min(num_elements, PIECE_ELEMENTS)
    if parameter.device.type == "cpu":
        scratch = CPU_SCRATCH_BYTES * min(num_elements, CPU_PIECE_ELEMENTS)
        key = others[12] if len(others) > 12 else rounding_key
        if key is not None and parameter.dtype is torch.bfloat16:
            # rounding comes when bitsandbytes' scratch is gone
            scratch = max(scratch, ROUNDING_BYTES * min(num_elements, ROUNDING_ELEMENTS))
        num_bytes += scratch
    return num_bytes


register_workspace("memrt::adamw_int8", workspace_bytes)


def _check(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_scales: Tensor,
    exp_avg_sq_scales: Tensor,
) -> None:
    for name, tensor in (("parameter", parameter), ("gradient", gradient)):
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; adamw_int8 takes fp32, bf16 and fp16")
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"gradient has shape {tuple(gradient.shape)}, the parameter {tuple(parameter.shape)}"
        )
    for name, codes in (("exp_avg", exp_avg_codes), ("exp_avg_sq", exp_avg_sq_codes)):
        if codes.dtype != torch.uint8 or not codes.is_contiguous():
            raise ValueError(f"{name}_codes must be contiguous uint8, got {codes.dtype}")
        if codes.numel() != parameter.numel():
            raise ValueError(
                f"{name}_codes has {codes.numel()} elements, the parameter {parameter.numel()}"
            )
    for name, scales in (("exp_avg", exp_avg_scales), ("exp_avg_sq", exp_avg_sq_scales)):
        if scales.dtype != torch.float32 or scales.numel() != num_blocks(parameter.numel()):
            raise ValueError(
                f"{name}_scales must be {num_blocks(parameter.numel())} fp32 values, got "
                f"{scales.numel()} of {scales.dtype}"
            )


def _pieces(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _bitsandbytes_update() -> Callable[..., None]:
    try:
        with without_hub_warning(), float32_by_default():
            from bitsandbytes.functional import optimizer_update_8bit_blockwise
    except ImportError as error:
        raise ImportError(
            "8-bit optimizer state is computed by bitsandbytes, which cannot be imported; "
            "run: pip install bitsandbytes, or keep state_format='float32'"
        ) from error
    update: Callable[..., None] = optimizer_update_8bit_blockwise
    return update
