"""One AdamW step on moments kept in FP8 with dynamic range expansion.

Formula, for a parameter p [n], gradient g [n], step t = 1, 2, ... and moments m, v [n], in fp32:

    m, v from codes, largest values and powers          (`memrt.kernels.expanded_fp8`)
    p, m, v <- one step of AdamW with g and t           (`memrt.kernels.adamw_step`)
    m, v to codes, in groups of 128 elements in row-major order, the last one ragged

The update of p uses the moments before they are rounded. No group is poisoned by an element whose
gradient is not finite: it is left alone, with its moments. bf16 parameters are rounded
stochastically when a rounding key is given, else to the nearest.

Bytes: 2 codes an element, and 2 * (4 + 1) of 128: 2.078 instead of 8. Traffic on CUDA, where it is
one pass of one Triton kernel: bf16 parameter and gradient 2 + 2 + 2, codes 4, groups 0.16, so 10.2
bytes an element (AdamW with fp32 moments: 22); it reads a table of 256 KiB, once a device.
Temporaries: none on CUDA but copies of what is not contiguous; on the CPU up to 72 bytes an element
of an eager piece of 2^16 elements, or 25 of a compiled one of 2^18 (`workspace_bytes`).
Many parameters in one call: `memrt.kernels.adamw_fp8_foreach`.

Codes and groups have the same bits eagerly, compiled and in Triton.

Source: Xi et al., COAT, arXiv 2410.19313.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memrt.kernels.adamw_step import (
    COMPILED_FROM_ELEMENTS,
    PIECE_ELEMENTS,
    check_parameter,
    check_state,
    in_groups,
    key_tensor,
    scratch_bytes,
    step_in_pieces,
    step_scalars,
    stepped,
    write_parameter,
)
from memrt.kernels.compiled import CompiledFunction
from memrt.kernels.dispatch import uses_triton
from memrt.kernels.expanded_fp8 import (
    GROUP_SIZE,
    dequantize_expanded_reference,
    num_groups,
    quantize_expanded_reference,
)
from memrt.profiling.ledger import register_workspace

__all__ = [
    "State",
    "adamw_fp8",
    "adamw_fp8_reference",
    "check_arguments",
    "step_one",
    "workspace_bytes",
]

SCRATCH_BYTES = 72  # at most 71 were seen of whole groups, 74 with padding
COMPILED_SCRATCH_BYTES = 25  # 24.2 were seen in fp32, 20.2 in bf16


class State(NamedTuple):
    """The tensors that hold both moments; codes of the parameter's shape, the others [groups]."""

    exp_avg_codes: Tensor
    exp_avg_sq_codes: Tensor
    exp_avg_largest: Tensor
    exp_avg_sq_largest: Tensor
    exp_avg_power: Tensor
    exp_avg_sq_power: Tensor


@torch.no_grad()
def adamw_fp8_reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_largest: Tensor,
    exp_avg_sq_largest: Tensor,
    exp_avg_power: Tensor,
    exp_avg_sq_power: Tensor,
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
    key = key_tensor(parameter, rounding_key, number)
    weight = parameter.contiguous().view(-1)
    _step_piece(
        weight,
        gradient.reshape(-1),
        exp_avg_codes.view(-1),
        exp_avg_sq_codes.view(-1),
        exp_avg_largest,
        exp_avg_sq_largest,
        exp_avg_power,
        exp_avg_sq_power,
        scalars,
        key,
        torch.tensor(0),
    )
    parameter.copy_(weight.view(parameter.shape))


# ---------------------------------------------------------------- operator


@torch.library.custom_op(
    "memrt::adamw_fp8",
    mutates_args=(
        "parameter",
        "exp_avg_codes",
        "exp_avg_sq_codes",
        "exp_avg_largest",
        "exp_avg_sq_largest",
        "exp_avg_power",
        "exp_avg_sq_power",
    ),
)
def adamw_fp8(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_largest: Tensor,
    exp_avg_sq_largest: Tensor,
    exp_avg_power: Tensor,
    exp_avg_sq_power: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_key: Sequence[int] | None = None,
) -> None:
    """One AdamW step, in place on the parameter and its FP8 moments.

    parameter, gradient: same shape; fp32, bf16 or fp16. exp_avg_codes, exp_avg_sq_codes: uint8,
    contiguous, as many elements. exp_avg_largest, exp_avg_sq_largest: fp32 [groups].
    exp_avg_power, exp_avg_sq_power: uint8 [groups]. step: the number of this step, from 1; best on
    the host, for its value is read. rounding_key: of `stochastic_rounding.rounding_key`.
    """
    state = State(
        exp_avg_codes,
        exp_avg_sq_codes,
        exp_avg_largest,
        exp_avg_sq_largest,
        exp_avg_power,
        exp_avg_sq_power,
    )
    check_arguments(parameter, gradient, state)
    numbers = (lr, beta1, beta2, eps, weight_decay)
    step_one(parameter, gradient, state, int(step.item()), numbers, rounding_key)


def step_one(
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    number: int,
    numbers: tuple[float, float, float, float, float],
    rounding_key: Sequence[int] | None,
) -> None:
    """The operator's body; `numbers` are lr, beta1, beta2, eps and weight decay."""
    scalars = step_scalars(number, *numbers)
    weight = parameter.contiguous().view(-1)
    grad = gradient.contiguous().view(-1)
    state = State(state[0].view(-1), state[1].view(-1), *state[2:])
    if uses_triton(parameter):
        from memrt.kernels._triton.adamw_fp8 import One, launch

        launch(One(weight, grad, state, scalars, rounding_key, number))
    else:
        key = key_tensor(parameter, rounding_key, number)
        _step_in_pieces(weight, grad, state, torch.tensor(scalars, dtype=torch.float32), key)
    if not parameter.is_contiguous():
        parameter.copy_(weight.view(parameter.shape))


@adamw_fp8.register_fake
def _(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_largest: Tensor,
    exp_avg_sq_largest: Tensor,
    exp_avg_power: Tensor,
    exp_avg_sq_power: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_key: Sequence[int] | None = None,
) -> None:
    check_arguments(
        parameter,
        gradient,
        State(
            exp_avg_codes,
            exp_avg_sq_codes,
            exp_avg_largest,
            exp_avg_sq_largest,
            exp_avg_power,
            exp_avg_sq_power,
        ),
    )


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


register_workspace("memrt::adamw_fp8", workspace_bytes)


# ---------------------------------------------------------------- on the CPU


def _step_in_pieces(
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    scalars: Tensor,
    key: Tensor | None,
) -> None:
    def arguments(start: int, stop: int) -> tuple[Tensor | None, ...]:
        part, groups = slice(start, stop), slice(start // GROUP_SIZE, num_groups(stop))
        piece = State(*(t[part] for t in state[:2]), *(t[groups] for t in state[2:]))
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
    m_codes: Tensor,
    v_codes: Tensor,
    m_largest: Tensor,
    v_largest: Tensor,
    m_power: Tensor,
    v_power: Tensor,
    scalars: Tensor,
    key: Tensor | None,
    first_index: Tensor,
) -> None:
    """A step of neighbouring elements from a group's first on, in place."""
    n = parameter.numel()
    p, m, v = stepped(
        in_groups(parameter).float(),
        in_groups(gradient).float(),
        dequantize_expanded_reference(in_groups(m_codes), m_largest, m_power, positive=False),
        dequantize_expanded_reference(in_groups(v_codes), v_largest, v_power, positive=True),
        scalars,
    )
    write_parameter(parameter, p.view(-1)[:n], key, first_index)
    codes, largest, power = quantize_expanded_reference(m, positive=False)
    m_codes.copy_(codes.view(-1)[:n])
    m_largest.copy_(largest)
    m_power.copy_(power)
    codes, largest, power = quantize_expanded_reference(v, positive=True)
    v_codes.copy_(codes.view(-1)[:n])
    v_largest.copy_(largest)
    v_power.copy_(power)


_compiled_piece = CompiledFunction(_step_piece)


def check_arguments(parameter: Tensor, gradient: Tensor, state: State) -> None:
    """Refuse what the step does not take."""
    check_parameter("adamw_fp8", parameter, gradient)
    groups = num_groups(parameter.numel())
    dtypes = (torch.uint8, torch.uint8, torch.float32, torch.float32, torch.uint8, torch.uint8)
    sizes = (parameter.numel(), parameter.numel(), groups, groups, groups, groups)
    for name, tensor, dtype, size in zip(State._fields, state, dtypes, sizes, strict=True):
        check_state(name, tensor, num_elements=size, dtype=dtype)
