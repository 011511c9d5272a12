"""What AdamW steps on moments in few bits share: the update, groups of 128, and the last rounding.

    p <- p * (1 - lr * weight_decay)
    m <- beta1 * m + (1 - beta1) * g,     v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

in fp32, in one order, without fused multiply-adds, so that moments have the same bits eagerly,
compiled and in Triton. An element whose gradient is not finite is left alone, with its moments.
Parameters differ by a rounding of root and quotient, which PyTorch itself rounds in two ways.

Source: Loshchilov and Hutter, arXiv 1711.05101, in the order of torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from memrt.kernels.compiled import CompiledFunction
from memrt.kernels.stochastic_rounding import random_bits_from, stochastic_round_reference

__all__ = [
    "COMPILED_FROM_ELEMENTS",
    "GROUP_SIZE",
    "PIECE_ELEMENTS",
    "check_parameter",
    "check_state",
    "in_groups",
    "key_tensor",
    "num_groups",
    "pieces",
    "scratch_bytes",
    "step_in_pieces",
    "step_scalars",
    "stepped",
    "write_parameter",
]

GROUP_SIZE = 128
# The CPU takes a parameter in pieces: eager ones of PIECE_ELEMENTS, compiled ones of three sizes.
# The rest, and a parameter too small to be worth some seconds of compiling, go eagerly.
COMPILED_FROM_ELEMENTS = 2**16
PIECE_ELEMENTS = 2**16
"""Caches hold what an eager piece needs."""
LARGEST_PIECE = 4
"""Eager pieces in the largest compiled one: a call of compiled code costs some 60 us, and it keeps
a third of the temporaries."""
SHORTER = 8
"""How much shorter the next size is: eagerly, even a few elements take a millisecond."""
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def num_groups(num_elements: int) -> int:
    """How many groups cover `num_elements`, the last one ragged."""
    return -(-num_elements // GROUP_SIZE)


def in_groups(tensor: Tensor) -> Tensor:
    """A flat tensor as [groups, 128], filled up with zeros."""
    missing = num_groups(tensor.numel()) * GROUP_SIZE - tensor.numel()
    return (pad(tensor, (0, missing)) if missing else tensor).view(-1, GROUP_SIZE)


def pieces(num_elements: int, *, whole: int, compiled_from: int) -> Iterator[tuple[int, int, bool]]:
    """First and last element of every piece, and whether it is of a size that is compiled.

    Large pieces, then shorter ones, then the rest. Only the number of elements decides: a resumed
    run takes each piece the same way.
    """
    largest = LARGEST_PIECE * whole
    sizes = [largest, largest // SHORTER, largest // SHORTER**2]
    if num_elements < compiled_from:
        sizes = []
    start = 0
    while start < num_elements:
        left = num_elements - start
        size = next((size for size in sizes if size <= left), min(left, whole))
        yield start, start + size, size in sizes
        start += size


def step_in_pieces(
    num_elements: int,
    arguments: Callable[[int, int], tuple[Tensor | None, ...]],
    *,
    step: Callable[..., None],
    compiled: CompiledFunction,
    whole: int,
    compiled_from: int,
) -> None:
    """Take `step` on `arguments(first, last)` of every piece, by compiled code where it can be."""
    for start, stop, is_compiled in pieces(num_elements, whole=whole, compiled_from=compiled_from):
        if is_compiled and compiled(*arguments(start, stop)):
            continue
        for first in range(start, stop, whole):
            step(*arguments(first, min(first + whole, stop)))


def scratch_bytes(num_elements: int, *, whole: int, eager: int, compiled: int) -> int:
    """The most bytes of temporaries of `step_in_pieces`, of which an element takes so many."""

    def padded(most: int) -> int:
        return num_groups(min(num_elements, most)) * GROUP_SIZE

    return max(eager * padded(whole), compiled * padded(LARGEST_PIECE * whole))


def step_scalars(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> list[float]:
    """What the formula multiplies with in this step; computed in fp64, used in fp32."""
    return [
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / (1 - beta2**step) ** 0.5,
        eps,
    ]


def stepped(
    p: Tensor, g: Tensor, m_before: Tensor, v_before: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """p, m and v after the step, all fp32 of one shape; `scalars` of `step_scalars`."""
    decay, step_size, beta1, rest1, beta2, rest2, correction, eps = scalars.unbind()
    m = beta1 * m_before + rest1 * g
    v = beta2 * v_before + rest2 * g * g
    p_after = p * decay - step_size * m / (v.sqrt() * correction + eps)
    finite = g.abs() < torch.inf
    return (
        torch.where(finite, p_after, p),
        torch.where(finite, m, m_before),
        torch.where(finite, v, v_before),
    )


def key_tensor(parameter: Tensor, rounding_key: Sequence[int] | None, step: int) -> Tensor | None:
    """Two words and the step, for `write_parameter`; None rounds to the nearest."""
    if rounding_key is None or parameter.dtype is not torch.bfloat16:
        return None
    return torch.tensor([*rounding_key, step])


def write_parameter(parameter: Tensor, p: Tensor, key: Tensor | None, first_index: Tensor) -> None:
    """parameter <- p (fp32), both flat; `first_index` counts from the whole parameter's start."""
    if key is not None:
        p = stochastic_round_reference(p, random_bits_from(first_index, p.numel(), key, key[2]))
    parameter.copy_(p)


# ---------------------------------------------------------------- checks


def check_parameter(operator: str, parameter: Tensor, gradient: Tensor) -> None:
    """Refuse dtypes and shapes that the step does not take."""
    for name, tensor in (("parameter", parameter), ("gradient", gradient)):
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; {operator} takes fp32, bf16 and fp16")
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"gradient has shape {tuple(gradient.shape)}, the parameter {tuple(parameter.shape)}"
        )


def check_state(name: str, tensor: Tensor, *, num_elements: int, dtype: torch.dtype) -> None:
    """Refuse a tensor of the state that is not laid out as the operator reads it."""
    if tensor.dtype is not dtype or tensor.numel() != num_elements or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be {num_elements} contiguous elements of {dtype}, got "
            f"{tensor.numel()} of {tensor.dtype}"
        )
