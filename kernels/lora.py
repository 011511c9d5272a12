"""LoRA's branch beside a frozen layer, and the gated product before it, keeping less for backward.

Formula, for the frozen layer's output Y [tokens, out] and input X [tokens, in], A [r, in],
B [out, r], a dropout mask M with values 0 or 1/(1-p), and s = alpha / r:

    H = (M ∘ X) Aᵀ,   Z = Y + s · H Bᵀ              computed in the adapters' dtype, fp32 by default
    dB = s · dZᵀ H,   dH = s · dZ B,   dA = dHᵀ (M ∘ X),   dX = M ∘ (dH A),   dY = dZ

`lora` keeps X as it came, in the base's dtype, and nothing else: H is computed again (2 · tokens ·
in · r operations), the mask drawn again from the state that the generator had. Plain autograd keeps
for each layer an fp32 copy of X, with dropout the mask and the dropped X too. Layers that share
their input keep it once.

`gated_product` is P = f(G) ∘ U of a gated MLP. It keeps G and U, where autograd keeps f(G) too.
With `source`, `lora` of the layer behind it keeps no P either: it is made again from G and U.

Bytes kept a token of a SwiGLU layer of width h and inner width φh, in units of 2h (bf16), adapters
on q, k, v, up, down, without dropout: 2 + 2φ where PEFT's graph keeps 8 + 5φ. Workspace: one fp32
copy of X, one more each for M and M ∘ X. Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels.mixed_precision import product_dtype

__all__ = ["Source", "gated_product", "lora", "lora_reference"]


class Source(NamedTuple):
    """What an input was made of: activation(gate) * up."""

    activation: Callable[[Tensor], Tensor]
    gate: Tensor
    up: Tensor


def lora_reference(
    output: Tensor, x: Tensor, a: Tensor, b: Tensor, *, scaling: float, dropout: float
) -> Tensor:
    """The formula at the top of this file as PEFT writes it, for autograd."""
    dropped = functional.dropout(x.to(a.dtype), dropout)
    branch = functional.linear(functional.linear(dropped, a), b)
    return (output + branch * scaling).to(output.dtype)


def lora(
    output: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    source: Source | None = None,
) -> Tensor:
    """Return Z, for the frozen layer's `output` Y and input `x`.

    `dropout` is applied as given, so pass 0 in evaluation. `source` says of what `x` was made, with
    tensors that backward keeps anyway.
    """
    apply: Any = _Lora.apply
    return cast(Tensor, apply(output, x, a, b, scaling, dropout, source))


def gated_product(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return activation(gate) * up. The activation must have neither state nor parameters."""
    apply: Any = _GatedProduct.apply
    return cast(Tensor, apply(gate, up, activation))


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
        source: Source | None,
    ) -> Tensor:
        ctx.scaling, ctx.dropout = scaling, dropout
        ctx.activation = None if source is None else source.activation
        ctx.generator_state = _generator_state(x.device) if dropout else None
        kept = (x,) if source is None else (source.gate.detach(), source.up.detach())
        ctx.save_for_backward(a, b, *kept)
        wide = x.to(a.dtype)
        ctx.dtype = product_dtype(wide)
        dropped = functional.dropout(wide, dropout) if dropout else wide
        del wide
        hidden = functional.linear(dropped.to(ctx.dtype), a.to(ctx.dtype))  # [tokens, r]
        del dropped
        branch = functional.linear(hidden, b.to(ctx.dtype))
        return (output + branch * scaling).to(output.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("a fused LoRA layer has no second derivative")
        a, b, *kept = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            x = kept[0] if ctx.activation is None else ctx.activation(kept[0]) * kept[1]
            x_dtype, shape = x.dtype, x.shape
            wide = x.to(a.dtype).reshape(-1, shape[-1])  # [tokens, in]
            del x, kept
            mask = _mask(ctx, wide.view(shape))
            inputs = (wide if mask is None else wide * mask.view_as(wide)).to(ctx.dtype)
            del wide
            low_a, low_b = a.to(ctx.dtype), b.to(ctx.dtype)
            flat = gradient.reshape(-1, gradient.shape[-1]).to(ctx.dtype) * ctx.scaling
            hidden = functional.linear(inputs, low_a)  # [tokens, r]
            b_gradient = (flat.t() @ hidden).to(b.dtype)
            low = flat @ low_b  # [tokens, r]
            del flat, hidden
            a_gradient = (low.t() @ inputs).to(a.dtype)
            del inputs
            x_gradient = None
            if ctx.needs_input_grad[1]:
                x_gradient = (low @ low_a).to(a.dtype).view(shape)
                if mask is not None:
                    x_gradient *= mask
                x_gradient = x_gradient.to(x_dtype)
        output_gradient = gradient if ctx.needs_input_grad[0] else None
        return output_gradient, x_gradient, a_gradient, b_gradient, None, None, None


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        needs_gate, needs_up, _ = ctx.needs_input_grad
        leaf = gate.detach().requires_grad_(needs_gate)
        with torch.enable_grad() if needs_gate else nullcontext():
            activated = ctx.activation(leaf)
        up_gradient = gradient * activated.detach() if needs_up else None
        gate_gradient = None
        if needs_gate:
            (gate_gradient,) = torch.autograd.grad(activated, leaf, gradient * up)
        return gate_gradient, up_gradient, None


def _generator_state(device: torch.device) -> Tensor:
    """What the dropout's generator will draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _mask(ctx: Any, like: Tensor) -> Tensor | None:
    """The dropout's mask again, 0 or 1/(1-p); the generator is left as it was."""
    if not ctx.dropout:
        return None
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if devices:
            torch.cuda.set_rng_state(ctx.generator_state, like.device)
        else:
            torch.set_rng_state(ctx.generator_state)
        return functional.dropout(torch.ones_like(like), ctx.dropout)
