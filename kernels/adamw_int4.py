"""One AdamW step on moments kept in 4 bits, block by block.

Formula, for a parameter p [n], gradient g [n], step t = 1, 2, ... and moments m, v [n], in fp32:

    m, v from codes and scales                          (`memrt.kernels.blockwise_int4`)
    p, m, v <- one step of AdamW with g and t           (`memrt.kernels.adamw_step`)
    m, v to codes, in blocks of 128 elements in row-major order, the last one ragged

The update of p uses the moments before they are rounded. No block is poisoned by an element whose
gradient is not finite: it is left alone, with its moments. bf16 parameters are rounded
stochastically when a rounding key is given, else to the nearest.

Bytes: two codes in one byte, and 2 * 4 of 128: 1.06 an element instead of 8. Traffic on CUDA, where
it is one pass of one Triton kernel: bf16 parameter and gradient 2 + 2 + 2, state 2.13, so 8.1 bytes
an element. Temporaries: none on CUDA but copies of what is not contiguous; on the CPU up to 76
bytes an element of an eager piece of 2^16 elements, or 29 of a compiled one of 2^18
(`workspace_bytes`).

Source: Li, Chen and Zhu, Memory Efficient Optimizers with 4-bit States, arXiv 2309.01507.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memrt.kernels.adamw_step import (
    COMPILED_FROM_ELEMENTS,
    GROUP_SIZE,
    PIECE_ELEMENTS,
    check_parameter,
    check_state,
    in_groups,
    key_tensor,
    num_groups,
    scratch_bytes,
    step_in_pieces,
    step_scalars,
    stepped,
    write_parameter,
)
from memrt.kernels.blockwise_int4 import (
    dequantize_dynamic_reference,
    dequantize_square_reference,
    packed,
    quantize_dynamic_reference,
    quantize_square_reference,
    unpacked,
)
from memrt.kernels.compiled import CompiledFunction
from memrt.kernels.dispatch import uses_triton
from memrt.profiling.ledger import register_workspace

__all__ = ["adamw_int4", "adamw_int4_reference", "num_code_bytes", "workspace_bytes"]

SCRATCH_BYTES = 76
COMPILED_SCRATCH_BYTES = 29  # 28.1 were seen


class State(NamedTuple):
    """The tensors that hold both moments: codes, two in a byte, and scales [blocks]."""

    exp_avg_codes: Tensor
    exp_avg_sq_codes: Tensor
    exp_avg_scales: Tensor
    exp_avg_sq_scales: Tensor


def num_code_bytes(num_elements: int) -> int:
    """The bytes that hold the codes of one moment."""
    return -(-num_elements // 2)


@torch.no_grad()
def adamw_int4_reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_scales: Tensor,
    exp_avg_sq_scales: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_key: Sequence[int] | None = None,
) -> None:
    """The step in plain PyTorch, in place, of all elements at once. For reading and for tests."""
    number = int(step)
    scalars = torch.tensor(
        step_scalars(number, lr, beta1, beta2, eps, weight_decay), dtype=torch.float32
    )
    weight = parameter.contiguous().view(-1)
    _step_piece(
        weight,
        gradient.reshape(-1),
        exp_avg_codes,
        exp_avg_sq_codes,
        exp_avg_scales,
        exp_avg_sq_scales,
        scalars,
        key_tensor(parameter, rounding_key, number),
        torch.tensor(0),
    )
    parameter.copy_(weight.view(parameter.shape))


# ---------------------------------------------------------------- operator


@torch.library.custom_op(
    "memrt::adamw_int4",
    mutates_args=(
        "parameter",
        "exp_avg_codes",
        "exp_avg_sq_codes",
        "exp_avg_scales",
        "exp_avg_sq_scales",
    ),
)
def adamw_int4(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_scales: Tensor,
    exp_avg_sq_scales: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_key: Sequence[int] | None = None,
) -> None:
    """One AdamW step, in place on the parameter and its 4-bit moments.

    parameter, gradient: same shape; fp32, bf16 or fp16. exp_avg_codes, exp_avg_sq_codes: uint8
    [num_code_bytes]. exp_avg_scales, exp_avg_sq_scales: fp32 [blocks]. step: the number of this
    step, from 1; best on the host, for its value is read. rounding_key: of
    `stochastic_rounding.rounding_key`.
    """
    state = State(exp_avg_codes, exp_avg_sq_codes, exp_avg_scales, exp_avg_sq_scales)
    _check(parameter, gradient, state)
    number = int(step.item())
    scalars = step_scalars(number, lr, beta1, beta2, eps, weight_decay)
    weight = parameter.contiguous().view(-1)
    grad = gradient.contiguous().view(-1)
    if uses_triton(parameter):
        from memrt.kernels._triton.adamw_int4 import launch

        launch(weight, grad, state, scalars, rounding_key, number)
    else:
        key = key_tensor(parameter, rounding_key, number)
        _step_in_pieces(weight, grad, state, torch.tensor(scalars, dtype=torch.float32), key)
    if not parameter.is_contiguous():
        parameter.copy_(weight.view(parameter.shape))


@adamw_int4.register_fake
def _(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_scales: Tensor,
    exp_avg_sq_scales: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_key: Sequence[int] | None = None,
) -> None:
    state = State(exp_avg_codes, exp_avg_sq_codes, exp_avg_scales, exp_avg_sq_scales)
    _check(parameter, gradient, state)


def workspace_bytes(parameter: Tensor, gradient: Tensor, *_: Any, **__: Any) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    num_bytes = sum(
        tensor.element_size() * tensor.numel()
        for tensor in (parameter, gradient)
        if not tensor.is_contiguous()
    )
    if not uses_triton(parameter):
        num_bytes += scratch_bytes(
            parameter.numel(),
            whole=PIECE_ELEMENTS,
            eager=SCRATCH_BYTES,
            compiled=COMPILED_SCRATCH_BYTES,
        )
    return num_bytes


register_workspace("memrt::adamw_int4", workspace_bytes)


def _check(parameter: Tensor, gradient: Tensor, state: State) -> None:
    check_parameter("adamw_int4", parameter, gradient)
    num_bytes, blocks = num_code_bytes(parameter.numel()), num_groups(parameter.numel())
    dtypes = (torch.uint8, torch.uint8, torch.float32, torch.float32)
    sizes = (num_bytes, num_bytes, blocks, blocks)
    for name, tensor, dtype, size in zip(State._fields, state, dtypes, sizes, strict=True):
        check_state(name, tensor, num_elements=size, dtype=dtype)


# ---------------------------------------------------------------- on the CPU


def _step_in_pieces(
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    scalars: Tensor,
    key: Tensor | None,
) -> None:
    def arguments(start: int, stop: int) -> tuple[Tensor | None, ...]:
        part, data = slice(start, stop), slice(start // 2, num_code_bytes(stop))
        blocks = slice(start // GROUP_SIZE, num_groups(stop))
        piece = State(*(t[data] for t in state[:2]), *(t[blocks] for t in state[2:]))
        return parameter[part], gradient[part], *piece, scalars, key, torch.tensor(start)

    step_in_pieces(
        parameter.numel(),
        arguments,
        step=_step_piece,
        compiled=_compiled_piece,
        whole=PIECE_ELEMENTS,
        compiled_from=COMPILED_FROM_ELEMENTS,
    )


def _step_piece(
    parameter: Tensor,
    gradient: Tensor,
    m_data: Tensor,
    v_data: Tensor,
    m_scales: Tensor,
    v_scales: Tensor,
    scalars: Tensor,
    key: Tensor | None,
    first_index: Tensor,
) -> None:
    """A step of neighbouring elements from a block's first on, in place."""
    n = parameter.numel()
    p, m, v = stepped(
        in_groups(parameter).float(),
        in_groups(gradient).float(),
        _without_padding(dequantize_dynamic_reference(_codes(m_data), m_scales), n),
        _without_padding(dequantize_square_reference(_codes(v_data), v_scales), n),
        scalars,
    )
    write_parameter(parameter, p.view(-1)[:n], key, first_index)
    codes, scales = quantize_dynamic_reference(m)
    m_data.copy_(packed(codes)[: m_data.numel()])
    m_scales.copy_(scales)
    codes, scales = quantize_square_reference(v)
    v_data.copy_(packed(codes)[: v_data.numel()])
    v_scales.copy_(scales)


_compiled_piece = CompiledFunction(_step_piece)


def _codes(data: Tensor) -> Tensor:
    """Codes [blocks, 128] of bytes."""
    return in_groups(unpacked(data))


def _without_padding(values: Tensor, num_elements: int) -> Tensor:
    """[blocks, 128] with zeros beyond the last element, where no code stands for one."""
    return in_groups(values.view(-1)[:num_elements])
