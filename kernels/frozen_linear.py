"""Linear layers over a frozen weight that is kept in another form than the one it multiplies in.

    W = dense(packed) [out, in],       Y = X Wᵀ + b,       dX = dY W,       db = Σ dY_i

W is made for the product and dropped, in forward and again in backward, and has no gradient. With
`weight_is_in_out` (transformers' `Conv1D`) W is [in, out] and transposed in the product.

Bytes: kept for backward is the packed weight, which lives anyway, and nothing of X. The dense
weight, in · out elements of its dtype, is workspace twice a micro-batch; one of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels.mixed_precision import product_dtype

__all__ = ["frozen_linear"]


def frozen_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    dense: Callable[[Tensor], Tensor],
    *,
    weight_is_in_out: bool = False,
) -> Tensor:
    """Return ``F.linear(x, dense(packed), bias)``, with gradients to ``x`` and ``bias`` only."""
    if not torch.is_grad_enabled():
        return _product(x, packed, bias, dense, weight_is_in_out)
    apply: Any = _FrozenLinear.apply
    return cast(Tensor, apply(x, packed, bias, dense, weight_is_in_out))


def _oriented(
    packed: Tensor, dense: Callable[[Tensor], Tensor], weight_is_in_out: bool, dtype: torch.dtype
) -> Tensor:
    weight = dense(packed).to(dtype)
    return weight.t() if weight_is_in_out else weight


def _product(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    dense: Callable[[Tensor], Tensor],
    weight_is_in_out: bool,
) -> Tensor:
    dtype = product_dtype(x)
    weight = _oriented(packed, dense, weight_is_in_out, dtype)
    return functional.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        dense: Callable[[Tensor], Tensor],
        weight_is_in_out: bool,
    ) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(packed)
        ctx.dense, ctx.weight_is_in_out = dense, weight_is_in_out
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(x, packed, bias, dense, weight_is_in_out)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("a linear layer over a packed weight has no second derivative")
        x_gradient = bias_gradient = None
        # autocast may be on in backward too; dY has the product's dtype already
        with torch.autocast(output_gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                (packed,) = ctx.saved_tensors
                weight = _oriented(packed, ctx.dense, ctx.weight_is_in_out, output_gradient.dtype)
                x_gradient = torch.matmul(output_gradient, weight).to(ctx.x_dtype)
            if ctx.needs_input_grad[2]:
                flat = output_gradient.reshape(-1, output_gradient.shape[-1])  # [tokens, out]
                bias_gradient = flat.sum(dim=0, dtype=ctx.bias_dtype)
        return x_gradient, None, bias_gradient, None, None
