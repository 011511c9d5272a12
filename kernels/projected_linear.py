"""Linear layers whose backward never forms the weight gradient.

Formula, for X [tokens, in], weight W [out, in], bias b [out] (every leading dimension is tokens):

    Y = X Wᵀ + b,   dX = dY W,   db = Σ dY_i,   dW = dYᵀ X is left to a sink, as its two factors

``projected_conv1d`` is the same for transformers' ``Conv1D``, whose weight is [in, out]:
Y = X W + b and dW = Xᵀ dY. The sink gets ``accumulate(rows, columns)`` with dW = rowsᵀ @ columns in
the weight's own orientation, once per backward, before dX exists; a projection of it to rank r
costs 2 · tokens · r · (in + out) operations where dW costs 2 · tokens · in · out.

Bytes: the weight gradient, in · out · bytes of an element, never exists. Kept for backward is what
``F.linear`` keeps, X and W; under autocast X in the lower precision and W itself. The cast weight,
in · out · 2 bytes, is workspace of the forward and again of dX: autocast's cache is not used, for a
cast that is cached without grad mode would cut off any other use of the same weight.

The weight must keep ``requires_grad=True`` although its ``.grad`` stays None: autograd then records
the layer even where X needs no gradient. A frozen weight sends nothing to its sink.

Source: the low-rank update of GaLore (arXiv 2403.03507), reordered so that G is never formed.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels.mixed_precision import product_dtype

__all__ = ["GradientSink", "projected_conv1d", "projected_linear"]


class GradientSink(Protocol):
    """What takes the two factors of a weight gradient that is never formed."""

    def accumulate(self, rows: Tensor, columns: Tensor) -> None:
        """Take dW = rowsᵀ @ columns, for rows [tokens, weight rows], columns [tokens, columns].

        Runs inside backward, without grad mode and without autocast; neither factor may be changed.
        """


def projected_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sink: GradientSink) -> Tensor:
    """Return ``F.linear(x, weight, bias)``, for weight [out, in]; its gradient goes to ``sink``."""
    if not torch.is_grad_enabled():
        return functional.linear(x, weight, bias)
    return _apply(x, weight, bias, sink, False)


def projected_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, sink: GradientSink) -> Tensor:
    """Return ``x @ weight + bias``, for weight [in, out]; its gradient goes to ``sink``."""
    if not torch.is_grad_enabled():
        return functional.linear(x, weight.t(), bias)
    return _apply(x, weight, bias, sink, True)


def _apply(*args: Any) -> Tensor:
    apply: Any = _ProjectedLinear.apply
    return cast(Tensor, apply(*args))


class _ProjectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sink: GradientSink,
        weight_is_in_out: bool,
    ) -> Tensor:
        # Autograd sees one dtype on either side of this function; autocast's casts happen in here.
        cast_x = x.to(product_dtype(x))
        cast_weight = weight.to(product_dtype(weight))
        cast_bias = None if bias is None else bias.to(product_dtype(bias))
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(cast_x if needs_weight else None, weight if needs_x else None)
        ctx.sink = sink
        ctx.weight_is_in_out = weight_is_in_out
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        oriented = cast_weight.t() if weight_is_in_out else cast_weight  # [out, in]
        return functional.linear(cast_x, oriented, cast_bias)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("a projected linear layer has no second derivative")
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * 5
        # Autocast may be on in backward too, and would round fp32 products of the sink to bf16.
        with torch.autocast(output_gradient.device.type, enabled=False):
            flat = output_gradient.reshape(-1, output_gradient.shape[-1])  # [tokens, out]
            if needs_weight:
                flat_x = x.reshape(-1, x.shape[-1])  # [tokens, in]
                factors = (flat_x, flat) if ctx.weight_is_in_out else (flat, flat_x)
                ctx.sink.accumulate(*factors)
            if needs_x:
                oriented = weight.t() if ctx.weight_is_in_out else weight  # [out, in]
                product = flat @ oriented.to(flat.dtype)  # [tokens, in]
                gradients[0] = product.to(ctx.x_dtype).view(ctx.x_shape)
            if needs_bias:
                gradients[2] = flat.sum(dim=0, dtype=ctx.bias_dtype)
        return tuple(gradients)
