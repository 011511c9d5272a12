"""Backward of a ladder's gate and sum: `memrt.kernels.ladder` has the formula.

    dS = g dZ,   dD = (1 - g) dZ,   dg = Σ dZ (S - D),   db = Σ dD          (over tokens)

One operator, on CUDA one pass of a Triton kernel over dZ and S - D, with sums in two stages. Bytes
of temporaries: on CUDA 4 a channel for each of at most 128 strips of tokens, and for each sum; in
PyTorch one product, tokens · side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memrt.kernels.dispatch import uses_triton
from memrt.profiling.ledger import register_workspace

__all__ = ["flat_of", "mix_gradients", "strips_of", "takes_triton"]

MAX_STRIPS, STRIP_TOKENS = 128, 32
"""In Triton sums over tokens are made of at most so many strips, of a multiple of so many."""


def mix_gradients(
    gradient: Tensor,
    difference: Tensor | None,
    gate: Tensor,
    needs_state: bool,
    dtype: torch.dtype,
    needs_sums: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """dS, dD in `dtype`, dg, and the sum of dD over tokens, fp32; None where nobody asks."""
    d_state, d_down, channels, sums = _gradients(
        gradient, difference, gate, needs_state, dtype, needs_sums
    )
    d_gate = None
    if difference is not None:
        d_gate = (channels if gate.numel() > 1 else channels.sum().view(gate.shape)).to(gate.dtype)
    return d_state if needs_state else None, d_down, d_gate, sums if needs_sums else None


@torch.library.custom_op("memrt::ladder_gradients", mutates_args=())
def _gradients(
    gradient: Tensor,
    difference: Tensor | None,
    gate: Tensor,
    needs_state: bool,
    dtype: torch.dtype,
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dS, dD, Σ dZ (S - D) by channel and Σ dD, of which empty is what was not asked for."""
    if takes_triton(gradient) and gradient.numel():
        return _launch_gradients(gradient, difference, gate, needs_state, dtype, needs_sums)
    opened = gate.to(gradient.dtype)
    channels = _nothing(gradient) if difference is None else _sums(gradient * difference)
    down = (gradient * (1 - opened)).to(dtype)
    return (
        gradient * opened if needs_state else gradient.new_empty(0),
        down,
        channels,
        _sums(down) if needs_sums else _nothing(gradient),
    )


def _sums(values: Tensor) -> Tensor:
    """By channel, in fp32."""
    return values.reshape(-1, values.shape[-1]).sum(dim=0, dtype=torch.float32)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


def _launch_gradients(
    gradient: Tensor,
    difference: Tensor | None,
    gate: Tensor,
    needs_state: bool,
    dtype: torch.dtype,
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from memrt.kernels._triton.ladder import launch_gradients

    flat = flat_of(gradient)
    partial = (strips_of(flat.shape[0])[0], flat.shape[1])
    d_state = torch.empty_like(flat) if needs_state else None
    d_down = torch.empty_like(flat, dtype=dtype)
    channels, sums = (
        flat.new_empty(partial, dtype=torch.float32) if asked else None
        for asked in (difference is not None, needs_sums)
    )
    before = None if difference is None else flat_of(difference)
    launch_gradients(flat, before, gate, d_state, d_down, channels, sums)
    return (
        gradient.new_empty(0) if d_state is None else d_state.view(gradient.shape),
        d_down.view(gradient.shape),
        _nothing(flat) if channels is None else channels.sum(dim=0),
        _nothing(flat) if sums is None else sums.sum(dim=0),
    )


@_gradients.register_fake
def _(
    gradient: Tensor,
    difference: Tensor | None,
    gate: Tensor,
    needs_state: bool,
    dtype: torch.dtype,
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    side = gradient.shape[-1]
    return (
        gradient.new_empty(gradient.shape if needs_state else 0),
        gradient.new_empty(gradient.shape, dtype=dtype),
        gradient.new_empty(0 if difference is None else side, dtype=torch.float32),
        gradient.new_empty(side if needs_sums else 0, dtype=torch.float32),
    )


def _gradients_workspace_bytes(
    gradient: Tensor,
    difference: Tensor | None,
    gate: Tensor,
    needs_state: bool,
    dtype: torch.dtype,
    needs_sums: bool,
) -> int:
    side = gradient.shape[-1]
    if takes_triton(gradient):
        strips, _ = strips_of(gradient.shape[:-1].numel())
        return 4 * strips * side * ((difference is not None) + needs_sums)
    product = 0
    if difference is not None:
        wide = torch.promote_types(gradient.dtype, difference.dtype)
        product = gradient.numel() * wide.itemsize
    cast = gradient.numel() * gradient.element_size() if dtype != gradient.dtype else 0
    return max(product, cast)


register_workspace("memrt::ladder_gradients", _gradients_workspace_bytes)


def takes_triton(tensor: Tensor) -> bool:
    """Whether kernels that compute in fp32 will do."""
    return uses_triton(tensor) and tensor.dtype != torch.float64


def flat_of(tensor: Tensor) -> Tensor:
    """[tokens, channels], contiguous."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def strips_of(num_tokens: int) -> tuple[int, int]:
    """Into how many strips tokens are cut for sums on a GPU, and how long one is."""
    wanted = -(-num_tokens // STRIP_TOKENS)
    length = -(-wanted // MAX_STRIPS) * STRIP_TOKENS
    return max(1, -(-num_tokens // max(1, length))), max(STRIP_TOKENS, length)
