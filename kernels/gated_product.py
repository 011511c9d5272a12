"""The gated product of an MLP, keeping less for backward.

P = f(G) ∘ U for gate G and up U [tokens, inner]. Kept are G and U, where autograd keeps f(G) too.
With `source`, `memrt.kernels.lora` of the layer behind it keeps no P either: it is made again from
G and U. Bytes kept a token: 2 · inner · element size. Cost: f and one product more in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

__all__ = ["Source", "gated_product"]


class Source(NamedTuple):
    """What an input was made of: activation(gate) * up."""

    activation: Callable[[Tensor], Tensor]
    gate: Tensor
    up: Tensor


def gated_product(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return activation(gate) * up. The activation must have neither state nor parameters."""
    apply: Any = _GatedProduct.apply
    return cast(Tensor, apply(gate, up, activation))


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
