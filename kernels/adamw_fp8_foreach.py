"""One AdamW step on FP8 moments of many parameters, each with its own step number and rounding key.

The formula, and the bits, are those of `memrt.kernels.adamw_fp8`, one parameter after the other. On
CUDA one launch of a Triton kernel takes up to MAX_TENSORS parameters of one device, dtypes and kind
of rounding, where a launch for each would wait for the host: a fast GPU steps a million elements
(10 MB of traffic) in less time than a launch takes. Parameters and gradients that are not
contiguous are stepped one by one, through copies.

Traffic: that of `adamw_fp8`. Temporaries beside its own: on CUDA a table of 1 KiB and 112 bytes a
parameter, and as much pinned memory on the host until it is copied (`workspace_bytes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memrt.kernels.adamw_fp8 import State, check_arguments, step_one
from memrt.kernels.adamw_fp8 import workspace_bytes as one_workspace_bytes
from memrt.kernels.adamw_step import step_scalars
from memrt.kernels.dispatch import uses_triton
from memrt.profiling.ledger import register_workspace

__all__ = ["adamw_fp8_foreach", "workspace_bytes"]

MAX_TENSORS = 128
"""Of one launch."""
TABLE_COLUMNS = 14
"""Eight addresses, the number of elements, two numbers of the step, the key's two and the step."""


@torch.library.custom_op(
    "memrt::adamw_fp8_foreach",
    mutates_args=(
        "parameters",
        "exp_avg_codes",
        "exp_avg_sq_codes",
        "exp_avg_largest",
        "exp_avg_sq_largest",
        "exp_avg_power",
        "exp_avg_sq_power",
    ),
)
def adamw_fp8_foreach(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avg_codes: Sequence[Tensor],
    exp_avg_sq_codes: Sequence[Tensor],
    exp_avg_largest: Sequence[Tensor],
    exp_avg_sq_largest: Sequence[Tensor],
    exp_avg_power: Sequence[Tensor],
    exp_avg_sq_power: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_keys: Sequence[int],
) -> None:
    """`adamw_fp8` of each parameter with what stands at its place in the other lists.

    Nothing is stepped if one of them is refused. rounding_keys: two words a parameter; -1 and -1
    round it to the nearest.
    """
    states = _states(
        parameters,
        gradients,
        exp_avg_codes,
        exp_avg_sq_codes,
        exp_avg_largest,
        exp_avg_sq_largest,
        exp_avg_power,
        exp_avg_sq_power,
        steps,
        rounding_keys,
    )
    numbers = (lr, beta1, beta2, eps, weight_decay)
    together = []
    for index, (parameter, gradient, state) in enumerate(
        zip(parameters, gradients, states, strict=True)
    ):
        first, second = rounding_keys[2 * index : 2 * index + 2]
        key = None if first < 0 else (first, second)
        number = int(steps[index].item())
        if uses_triton(parameter) and parameter.is_contiguous() and gradient.is_contiguous():
            together.append((parameter, gradient, state, number, key))
        else:
            step_one(parameter, gradient, state, number, numbers, key)
    if together:
        from memrt.kernels._triton.adamw_fp8_foreach import One, launch_foreach

        launch_foreach(
            [
                One(p.view(-1), g.view(-1), state, step_scalars(number, *numbers), key, number)
                for p, g, state, number, key in together
            ]
        )


@adamw_fp8_foreach.register_fake
def _(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avg_codes: Sequence[Tensor],
    exp_avg_sq_codes: Sequence[Tensor],
    exp_avg_largest: Sequence[Tensor],
    exp_avg_sq_largest: Sequence[Tensor],
    exp_avg_power: Sequence[Tensor],
    exp_avg_sq_power: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_keys: Sequence[int],
) -> None:
    _states(
        parameters,
        gradients,
        exp_avg_codes,
        exp_avg_sq_codes,
        exp_avg_largest,
        exp_avg_sq_largest,
        exp_avg_power,
        exp_avg_sq_power,
        steps,
        rounding_keys,
    )


def _states(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], *lists: Sequence[Any]
) -> list[State]:
    """The state of each parameter; refuses lists and tensors that the step does not take."""
    *parts, steps, keys = lists
    lengths = {len(each) for each in (parameters, gradients, *parts, steps)}
    if lengths != {len(parameters)} or len(keys) != 2 * len(parameters):
        raise ValueError(
            f"adamw_fp8_foreach got {len(parameters)} parameters, lists of {sorted(lengths)} "
            f"tensors and {len(keys)} words of rounding keys; give one tensor and two words each"
        )
    states = [State(*tensors) for tensors in zip(*parts, strict=True)]
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        check_arguments(parameter, gradient, state)
    return states


def workspace_bytes(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], *_: Any, **__: Any
) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    pairs = list(zip(parameters, gradients, strict=True))
    copies = max((one_workspace_bytes(*pair) for pair in pairs), default=0)
    if len(pairs) < 2 or not uses_triton(parameters[0]):
        return copies
    table = 8 * (MAX_TENSORS + TABLE_COLUMNS * min(MAX_TENSORS, len(pairs)))
    return max(copies, table)


register_workspace("memrt::adamw_fp8_foreach", workspace_bytes)
