"""The rung of a ladder: bring a frozen hidden state down to the side's width and mix it in.

Formula, for a frozen hidden state H [..., hidden] that is read once, the side's state S
[..., side], weight W [side, hidden], bias b [side] and gate g [1] or [side] in [0, 1]:

    D = H Wᵀ + b,   Z = g S + (1 - g) D                          (``ladder_down``; Z = D without S)
    dS = g dZ,   dD = (1 - g) dZ,   dW = dDᵀ H,   db = Σ dD,   dg = Σ dZ (S - D)

H gets no gradient. ``ladder_mix`` is the second half alone, for a D that was made in another way.

Bytes kept for backward: H for dW (the *tap*: tokens · hidden elements; with ``kept="float8"`` one
byte each and one for every 32, `memrt.kernels.microscaled_fp8`, so that only dW is rounded), and
S - D (tokens · side) instead of S and D.

In Triton H is read once, for its eight bits too, and so are dZ and S - D in backward
(`memrt.kernels.ladder_gradients`); dW is PyTorch's product.

Source: the ladder of LST (arXiv 2206.06522); the reading in one operator is memrt's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels.ladder_gradients import flat_of, mix_gradients, takes_triton
from memrt.kernels.microscaled_fp8 import FLOAT8, microscale, num_groups, restore
from memrt.kernels.mixed_precision import block_rows, product_dtype
from memrt.profiling.ledger import register_workspace

__all__ = ["KEPT", "ladder_down", "ladder_mix", "ladder_reference"]

KEPT = ("exact", "float8")
"""How a tap is kept for the gradient of the down-projection."""


def ladder_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, gate: Tensor
) -> Tensor:
    """The formula at the top of this file in plain PyTorch. For reading and for tests."""
    down = functional.linear(hidden, weight, bias)  # [..., side]
    return gate * state + (1 - gate) * down


def ladder_down(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    kept: str = "exact",
) -> Tensor:
    """Return Z [..., side] of the formula; without ``state`` and ``gate``, D."""
    if (state is None) is not (gate is None):
        raise ValueError("state and gate go together: give both or neither")
    if kept not in KEPT:
        raise ValueError(f"kept={kept!r}: use one of {', '.join(KEPT)}")
    dtype = product_dtype(hidden)
    cast = (hidden.detach().to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if not torch.is_grad_enabled():
        down = functional.linear(*cast)
        return down if state is None or gate is None else _mixed(down, state, gate)
    result: Tensor = _down(*cast, state, gate, kept == "float8")[0]
    return result


def ladder_mix(down: Tensor, state: Tensor, gate: Tensor) -> Tensor:
    """Return g S + (1 - g) D for D and S [..., side]; keeps S - D for backward."""
    if not torch.is_grad_enabled():
        return _mixed(down, state, gate)
    result: Tensor = _mix(down, state, gate)[0]
    return result


def _mixed(down: Tensor, state: Tensor, gate: Tensor, *, in_place: bool = False) -> Tensor:
    # lerp is exact at both ends, where g S + (1 - g) D may meet 0 · inf
    opened = gate.to(state.dtype)
    if in_place and down.dtype == state.dtype:
        return down.lerp_(state, opened)
    return torch.lerp(down.to(state.dtype), state, opened)


# ---------------------------------------------------------------- down-projection, gate and sum


@torch.library.custom_op("memrt::ladder_down", mutates_args=())
def _down(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    gate: Tensor | None,
    float8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Z, S - D (empty without S), H in 8 bits and their exponents (empty unless ``float8``)."""
    if takes_triton(hidden) and (state is not None or float8):
        return _launch(hidden, weight, bias, state, gate, float8)
    down = functional.linear(hidden, weight, bias)
    mixed, difference = down, down.new_empty(0)
    if state is not None and gate is not None:
        difference = state - down
        mixed = _mixed(down, state, gate, in_place=True)
    codes, exponents = _nothing_kept(hidden)
    if float8:
        codes, exponents = microscale(flat_of(hidden))
        codes = codes.view(hidden.shape)
    return mixed, difference, codes, exponents


def _nothing_kept(hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(0, dtype=FLOAT8), hidden.new_empty(0, dtype=torch.uint8)


def _launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    gate: Tensor | None,
    float8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from memrt.kernels._triton.ladder import launch

    given = (hidden, weight, bias, state, gate, float8)
    mixed, difference, codes, exponents = _outputs(*given)
    before = None if state is None else flat_of(state)
    kept = (flat_of(codes), exponents) if float8 else None
    flat = flat_of(mixed), None if state is None else flat_of(difference)
    launch(flat_of(hidden), weight.contiguous(), bias, before, gate, *flat, kept)
    return mixed, difference, codes, exponents


def _outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    gate: Tensor | None,
    float8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `_down`, not yet filled."""
    shape = (*hidden.shape[:-1], weight.shape[0])
    mixed = hidden.new_empty(shape, dtype=hidden.dtype if state is None else state.dtype)
    difference = mixed.new_empty(0)
    if state is not None:
        difference = mixed.new_empty(shape, dtype=torch.promote_types(hidden.dtype, state.dtype))
    if not float8:
        return mixed, difference, *_nothing_kept(hidden)
    groups = (hidden.shape[:-1].numel(), num_groups(hidden.shape[-1]))
    codes = hidden.new_empty(hidden.shape, dtype=FLOAT8)
    return mixed, difference, codes, hidden.new_empty(groups, dtype=torch.uint8)


_down.register_fake(_outputs)


def _workspace_bytes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    gate: Tensor | None,
    float8: bool,
) -> int:
    if takes_triton(hidden) and (state is not None or float8):
        return 0
    tokens, width = hidden.shape[:-1].numel(), hidden.shape[-1]
    piece = min(tokens, block_rows(width, tokens)) * width * 4 if float8 else 0  # in fp32
    if state is None or hidden.dtype == state.dtype:
        return piece
    return piece + tokens * weight.shape[0] * hidden.element_size()  # D


register_workspace("memrt::ladder_down", _workspace_bytes)


def _down_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _, gate, float8 = inputs
    _, difference, codes, exponents = output
    ctx.mark_non_differentiable(difference, codes, exponents)
    tap = codes if float8 else hidden
    needs_weight = ctx.needs_input_grad[1]
    ctx.save_for_backward(
        tap if needs_weight else None,
        exponents if needs_weight and float8 else None,
        difference if gate is not None and ctx.needs_input_grad[4] else None,
        gate,
    )
    ctx.weight_dtype = weight.dtype
    ctx.has_bias = bias is not None


def _down_backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tap, exponents, difference, gate = ctx.saved_tensors
    dtype, sums = ctx.weight_dtype, ctx.has_bias and ctx.needs_input_grad[2]
    with torch.autocast(gradient.device.type, enabled=False):
        d_state = d_gate = None
        if gate is None:
            d_down = gradient.to(dtype)
            d_bias = d_down.flatten(0, -2).sum(dim=0, dtype=torch.float32) if sums else None
        else:
            d_state, d_down, d_gate, d_bias = mix_gradients(
                gradient, difference, gate, ctx.needs_input_grad[3], dtype, sums
            )
        flat = d_down.reshape(-1, d_down.shape[-1])  # [tokens, side]
        d_weight = None if tap is None else _weight_gradient(flat, tap, exponents)
    return None, d_weight, None if d_bias is None else d_bias.to(dtype), d_state, d_gate, None


def _weight_gradient(flat: Tensor, tap: Tensor, exponents: Tensor | None) -> Tensor:
    """dDᵀ H [side, hidden], of eight bits piece by piece."""
    tap = tap.reshape(-1, tap.shape[-1])  # [tokens, hidden]
    if exponents is None:
        return flat.t() @ tap
    total = torch.zeros(flat.shape[1], tap.shape[1], dtype=torch.float32, device=flat.device)
    rows = block_rows(tap.shape[1], tap.shape[0])
    pieces = (torch.split(tensor, rows) for tensor in (flat, tap, exponents))
    for left, codes, powers in zip(*pieces, strict=True):
        total += left.t() @ restore(codes, powers, left.dtype)
    return total.to(flat.dtype)


torch.library.register_autograd("memrt::ladder_down", _down_backward, setup_context=_down_context)


# ---------------------------------------------------------------- gate and sum alone


@torch.library.custom_op("memrt::ladder_mix", mutates_args=())
def _mix(down: Tensor, state: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Z and S - D."""
    if not takes_triton(state):
        return _mixed(down, state, gate), state - down
    from memrt.kernels._triton.ladder import launch_mix

    before = flat_of(state)
    mixed = torch.empty_like(before)
    difference = torch.empty_like(before, dtype=torch.promote_types(down.dtype, state.dtype))
    launch_mix(flat_of(down), before, gate, mixed, difference)
    return mixed.view(state.shape), difference.view(state.shape)


@_mix.register_fake
def _(down: Tensor, state: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    difference = state.new_empty(state.shape, dtype=torch.promote_types(down.dtype, state.dtype))
    return state.new_empty(state.shape), difference


def _mix_workspace_bytes(down: Tensor, state: Tensor, gate: Tensor) -> int:
    if down.dtype == state.dtype or takes_triton(state):
        return 0
    return state.numel() * state.element_size()


register_workspace("memrt::ladder_mix", _mix_workspace_bytes)


def _mix_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    down, _, gate = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1] if ctx.needs_input_grad[2] else None, gate)
    ctx.down_dtype = down.dtype


def _mix_backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    difference, gate = ctx.saved_tensors
    with torch.autocast(gradient.device.type, enabled=False):
        d_state, d_down, d_gate, _sums = mix_gradients(
            gradient, difference, gate, ctx.needs_input_grad[1], ctx.down_dtype, False
        )
    return d_down if ctx.needs_input_grad[0] else None, d_state, d_gate


torch.library.register_autograd("memrt::ladder_mix", _mix_backward, setup_context=_mix_context)
