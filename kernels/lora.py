"""LoRA's branch beside a frozen layer, keeping its input as it came and nothing else.

Formula, for the frozen layer's output Y [tokens, out] and input X [tokens, in], A [r, in],
B [out, r], a dropout mask M with values 0 or 1/(1-p), and s = alpha / r:

    H = (M ∘ X) Aᵀ,   Z = Y + s · H Bᵀ              computed in the adapters' dtype, fp32 by default
    dB = s · dZᵀ H,   dH = s · dZ B,   dA = dHᵀ (M ∘ X),   dX = M ∘ (dH A),   dY = dZ

X is kept in the base's dtype: H is computed again (2 · tokens · in · r operations), the mask drawn
again from the state that the generator had. Plain autograd keeps for each layer an fp32 copy of X,
with dropout the mask and the dropped X too. Layers that share their input keep it once; behind a
`gated_product` it is not kept either (`source`), but made again from gate and up.

Bytes kept a token of a SwiGLU layer of width h and inner width φh, in units of 2h (bf16), adapters
on q, k, v, up, down, without dropout: 2 + 2φ where PEFT's graph keeps 8 + 5φ.

Two operators, `memrt::lora` and `memrt::lora_backward`, do the arithmetic. In Triton X, dZ and Y
are read in their own dtypes, Z and dX written once; workspace is H and dH, tokens · r each, and
the parts of dA and dB. On the CPU, and in fp64 everywhere, PyTorch takes some tokens at a time
(`PIECE_ELEMENTS`). With dropout, M and M ∘ X are made before the operators in the adapters' dtype,
tokens · in each, with PyTorch's own dropout, so that masks are those of PEFT.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels.dispatch import uses_triton
from memrt.kernels.gated_product import Source
from memrt.kernels.mixed_precision import add_product_, product_dtype
from memrt.profiling.ledger import register_workspace

__all__ = ["backward_workspace_bytes", "forward_workspace_bytes", "lora", "lora_reference"]

PIECE_ELEMENTS = 1 << 20
"""Of a wide tensor that the CPU casts at a time: fits a cache in fp32, and BLAS is busy with it."""

MAX_SPLITS, SPLIT_TOKENS = 8, 1024
"""In Triton a weight's gradient is the sum of at most so many parts, of at least so many tokens."""


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


class _Lora(torch.autograd.Function):
    # no autograd of the operator's own: an activation cannot be an operator's argument
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
        ctx.scaling, ctx.dropout, ctx.dtype = scaling, dropout, product_dtype(a)
        ctx.activation = None if source is None else source.activation
        ctx.generator_state = _generator_state(x.device) if dropout else None
        kept = (x,) if source is None else (source.gate.detach(), source.up.detach())
        ctx.save_for_backward(a, b, *kept)
        inputs = functional.dropout(x.to(a.dtype), dropout) if dropout else x
        return cast(Tensor, _forward(output, inputs, a, b, scaling, ctx.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("a fused LoRA layer has no second derivative")
        a, b, *kept = ctx.saved_tensors
        needs_output, needs_x, *_ = ctx.needs_input_grad
        with torch.autocast(gradient.device.type, enabled=False):
            x = kept[0] if ctx.activation is None else ctx.activation(kept[0]) * kept[1]
            x_dtype = x.dtype
            mask = _mask(ctx, x, a.dtype)
            inputs = x if mask is None else x.to(a.dtype) * mask
            del x, kept
            x_gradient, a_gradient, b_gradient = _backward(
                gradient, inputs, a, b, ctx.scaling, ctx.dtype, needs_x
            )
            if mask is not None and needs_x:
                x_gradient = x_gradient.mul_(mask).to(x_dtype)
        return (
            gradient if needs_output else None,
            x_gradient if needs_x else None,
            a_gradient,
            b_gradient,
            *(None, None, None),
        )


def _generator_state(device: torch.device) -> Tensor:
    """What the dropout's generator will draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _mask(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The dropout's mask again, 0 or 1/(1-p); the generator is left as it was."""
    if not ctx.dropout:
        return None
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if devices:
            torch.cuda.set_rng_state(ctx.generator_state, x.device)
        else:
            torch.set_rng_state(ctx.generator_state)
        return functional.dropout(torch.ones_like(x, dtype=dtype), ctx.dropout)


# ---------------------------------------------------------------- forward


@torch.library.custom_op("memrt::lora", mutates_args=())
def _forward(
    output: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """Z, with products in `dtype`."""
    flat_x, flat_output = _flat(x), _flat(output)
    made = output.new_empty(output.shape)  # no view, which nothing could change in place
    result = made.view(flat_output.shape)
    if _in_triton(x, dtype):
        from memrt.kernels._triton.lora import launch_forward

        hidden = flat_x.new_empty(flat_x.shape[0], a.shape[0], dtype=dtype)
        flat_output, flat_x, a, b = (t.contiguous() for t in (flat_output, flat_x, a, b))
        launch_forward(flat_output, flat_x, a, b, hidden, result, scaling)
    else:
        low_a, low_b = a.to(dtype), b.to(dtype)
        for piece in _pieces(flat_x, flat_output):
            result[piece] = flat_output[piece] + functional.linear(
                functional.linear(flat_x[piece].to(dtype), low_a), low_b
            ).mul_(scaling)
    return made


@_forward.register_fake
def _(
    output: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    return output.new_empty(output.shape)


# ---------------------------------------------------------------- backward


@torch.library.custom_op("memrt::lora_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dtype: torch.dtype,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX (empty unless it is needed), dA and dB, with products in `dtype`."""
    flat_x, flat = _flat(x), _flat(gradient)
    made = [
        torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device),
        torch.empty(a.shape, dtype=a.dtype, device=a.device),
        torch.empty(b.shape, dtype=b.dtype, device=b.device),
    ]
    if _in_triton(x, dtype):
        from memrt.kernels._triton.lora import launch_backward

        hidden, low = flat_x.new_empty(2, flat_x.shape[0], a.shape[0], dtype=dtype).unbind()
        flat, flat_x, a, b = (t.contiguous() for t in (flat, flat_x, a, b))
        dx, da, db = made
        flat_dx = _flat(dx) if needs_x else None
        launch_backward(flat, flat_x, a, b, hidden, low, flat_dx, da, db, scaling)
    else:
        _backward_in_pieces(flat, flat_x, a.to(dtype), b.to(dtype), scaling, made)
    return made[0], made[1], made[2]


@_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dtype: torch.dtype,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), a.new_empty(a.shape), b.new_empty(b.shape)


def _backward_in_pieces(
    gradient: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, made: list[Tensor]
) -> None:
    """Fill `made`, for gradient [tokens, out], x [tokens, in], A and B in the product's dtype."""
    x_gradient, a_gradient, b_gradient = made
    flat_gradient = _flat(x_gradient) if x_gradient.numel() else x_gradient
    wide = torch.promote_types(a.dtype, torch.float32)
    totals = [
        each.zero_() if each.dtype == wide else torch.zeros_like(each, dtype=wide)
        for each in (a_gradient, b_gradient)
    ]
    for piece in _pieces(x, gradient):
        inputs, outer = x[piece].to(a.dtype), gradient[piece].to(a.dtype)
        low = (outer @ b).mul_(scaling)  # dH [tokens, r]
        add_product_(totals[0], low, inputs)
        add_product_(totals[1], outer, functional.linear(inputs, a).mul_(scaling))
        del inputs, outer  # or they would live on beside the next ones
        if x_gradient.numel():
            flat_gradient[piece] = low @ a
    for each, total in zip((a_gradient, b_gradient), totals, strict=True):
        if each is not total:
            each.copy_(total)


# ---------------------------------------------------------------- what both need


def _flat(tensor: Tensor) -> Tensor:
    """[tokens, width]."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _in_triton(x: Tensor, dtype: torch.dtype) -> bool:
    return uses_triton(x) and torch.float64 not in (x.dtype, dtype)


def _piece_rows(x: Tensor, output: Tensor) -> int:
    return max(1, PIECE_ELEMENTS // max(1, x.shape[-1], output.shape[-1]))


def _pieces(x: Tensor, output: Tensor) -> Iterator[slice]:
    rows = _piece_rows(x, output)
    for start in range(0, x.shape[0], rows):
        yield slice(start, start + rows)


def num_splits(num_tokens: int) -> int:
    """Of how many parts a weight's gradient is the sum in Triton."""
    return max(1, min(MAX_SPLITS, num_tokens // SPLIT_TOKENS))


def _cast_bytes(dtype: torch.dtype, *tensors: Tensor) -> int:
    return sum(each.numel() * dtype.itemsize for each in tensors if each.dtype != dtype)


def _copied_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if not t.is_contiguous())


def forward_workspace_bytes(
    output: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype
) -> int:
    """Temporaries inside `memrt::lora`: H; on the CPU casts, and what a piece needs.

    What oneDNN takes inside a bf16 product is not in it, as it is in no operator of PyTorch's.
    """
    tokens, rank = x.shape[:-1].numel(), a.shape[0]
    if _in_triton(x, dtype):
        return tokens * rank * dtype.itemsize + _copied_bytes(output, x, a, b)
    rows = min(tokens, _piece_rows(x, output))
    row_of_x = 0 if x.dtype == dtype else x.shape[-1] * dtype.itemsize
    wide = torch.promote_types(output.dtype, dtype)
    # the branch, the sum, and what of the two terms the addition casts
    num_casts = (output.dtype != wide) + (dtype != wide)
    summed = (dtype.itemsize + (1 + num_casts) * wide.itemsize) * output.shape[-1]
    return _cast_bytes(dtype, a, b) + rows * (rank * dtype.itemsize + max(row_of_x, summed))


def backward_workspace_bytes(
    gradient: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dtype: torch.dtype,
    needs_x: bool,
) -> int:
    """Temporaries inside `memrt::lora_backward`: H, dH, and parts of dA and dB, or of a piece."""
    tokens, rank, largest = x.shape[:-1].numel(), a.shape[0], max(a.numel(), b.numel())
    if _in_triton(x, dtype):
        splits = num_splits(tokens)
        parts = 4 * (splits + 1) * largest if splits > 1 else 0
        return 2 * tokens * rank * dtype.itemsize + parts + _copied_bytes(gradient, x, a, b)
    rows = min(tokens, _piece_rows(x, gradient))
    wide = torch.promote_types(dtype, torch.float32)
    casts = [each.shape[-1] * dtype.itemsize for each in (x, gradient) if each.dtype != dtype]
    row_of_dx = x.shape[-1] * dtype.itemsize if needs_x else 0
    product = 0 if wide == dtype else largest * dtype.itemsize
    in_piece = rows * (2 * rank * dtype.itemsize + max(sum(casts), row_of_dx)) + product
    return _cast_bytes(dtype, a, b) + _cast_bytes(wide, a, b) + in_piece


register_workspace("memrt::lora", forward_workspace_bytes)
register_workspace("memrt::lora_backward", backward_workspace_bytes)
