"""Linear head and cross entropy in one, chunked over tokens: the logits never exist at once.

Formula, for hidden H [tokens, hidden], weight W [vocab, hidden], bias b [vocab], labels y [tokens]:

    Z = H Wᵀ + b [tokens, vocab],  loss = Σ CE(Z_i, y_i) / N,  dH = dZ W,  dW = dZᵀ H,  db = Σ dZ_i

with CE and dZ, scale and soft-capping included, as in ``memrt.kernels.cross_entropy``. N is
``num_items``, or else the number of labels of the whole call that are not ignored: never of one
chunk. Without any such label N is 0 and the loss is NaN with zero gradients, exactly as in
``torch.nn.functional.cross_entropy``; with ``num_items`` the loss is then 0.

The gradients are formed in the forward, chunk by chunk; the backward only scales them by the
upstream gradient, in place unless the graph is retained (then a backward may come again).

Bytes, with c = min(chunk_tokens, tokens), i = bytes of an element of the dtype of the product (that
of the inputs, or autocast's), and E = BLOCK_ELEMENTS, the bound of every other temporary:

    kept for backward   tokens · hidden · i, and weight and bias once more: the gradients, of each
                        only what is needed; plain keeps H and tokens · vocab · 4, soft-capped 8
    workspace           c · vocab · i        the one chunk of logits, overwritten by its gradient
                      + E · 4                fp32 rows of it under softmax, unless i is 4
                      + E · 4                under soft-capping, for the slope of tanh
                   or + E · i                a tile of dW, where it joins a sum of another dtype
    sum of dW           vocab · hidden · 4   low-precision weight, several chunks, "float32": at the
                                             end it lives beside its cast, 4 + 2 bytes an element
    autocast            vocab · hidden · i   the cast weight, for the time of the forward

Scaling low-precision gradients takes E · 4 bytes in the backward. float16 gradients dZ are summed
before they are divided by N: a probability divided by thousands of tokens is zero in float16, and
the gradient scaler's factor arrives in the backward only.

Source: Liger Kernel (arXiv 2410.10989); Wijmans et al., "Cut Your Losses" (arXiv 2411.09009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels.cross_entropy import cross_entropy_
from memrt.kernels.mixed_precision import add_product_, product_dtype, scaled

__all__ = ["linear_cross_entropy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    ignore_index: int
    softcap: float | None
    logit_scale: float
    chunk_tokens: int
    accumulate: Literal["float32", "weight"]

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}: give a positive number, or None for none")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}: give at least one token")
        if self.accumulate not in ("float32", "weight"):
            raise ValueError(f"accumulate is {self.accumulate!r}: give 'float32' or 'weight'")


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int = 1024,
    accumulate: Literal["float32", "weight"] = "float32",
) -> Tensor:
    """Return the cross entropy of ``hidden @ weight.T + bias`` against ``labels``, a 0-dim tensor.

    The softmax is taken in fp32 (float64 for float64 inputs); the product runs in the dtype in
    which ``F.linear`` would, autocast included. ``accumulate="weight"`` sums the gradient of a
    low-precision weight in its own dtype: 4 bytes an element less, and one more rounding per chunk.
    """
    settings = _Settings(
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_tokens=chunk_tokens,
        accumulate=accumulate,
    )
    _check_inputs(hidden, weight, bias, labels, num_items)
    inputs = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        apply: Any = _LinearCrossEntropy.apply
        return cast(Tensor, apply(*inputs, labels, num_items, settings))
    return _evaluate(*inputs, labels, num_items, settings, wanted=(False, False, False))[0]


def _check_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, items: int | Tensor | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight is {tuple(weight.shape)}: "
            "give [tokens, hidden] and [vocab, hidden]"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {tuple(labels.shape)} of {labels.dtype}: "
            f"give one int64 label for each of the {hidden.shape[0]} tokens"
        )
    dtypes = {product_dtype(x) for x in (hidden, weight, bias) if x is not None}
    if len(dtypes) != 1:
        raise ValueError(f"hidden, weight and bias would multiply in {dtypes}: give one dtype")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}: give [vocab] = [{weight.shape[0]}]")
    if isinstance(items, Tensor) and items.dim() != 0:
        raise ValueError(f"num_items is {tuple(items.shape)}: give a 0-dim tensor")
    if isinstance(items, int) and items < 1:
        raise ValueError(f"num_items is {items}: give a positive number, or None to count")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        loss, gradients, hidden_factor = _evaluate(*args, wanted=ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients, hidden_factor)
        ctx.hidden_dtype = args[0].dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: these gradients would pass for constants
            raise RuntimeError("linear_cross_entropy has no second derivative: use F.cross_entropy")
        hidden, weight, bias, hidden_factor = ctx.saved_tensors
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        gradients: list[Tensor | None] = [None] * 6
        if hidden is not None:
            factor = upstream if hidden_factor is None else upstream * hidden_factor
            gradients[0] = scaled(hidden, factor, in_place=in_place, dtype=ctx.hidden_dtype)
        if weight is not None:
            gradients[1] = scaled(weight, upstream, in_place=in_place)
        if bias is not None:
            gradients[2] = scaled(bias, upstream, in_place=in_place)
        return tuple(gradients)


def _evaluate(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_items: int | Tensor | None,
    settings: _Settings,
    *,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, _Gradients, Tensor | None]:
    """Return the loss, the wanted gradients, and the factor that dH still lacks, if any."""
    dtype = product_dtype(hidden)
    loss_dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        valid = labels != settings.ignore_index  # [tokens]
        if isinstance(num_items, int):
            divisor = hidden.new_full((), num_items, dtype=loss_dtype)
        else:
            count = valid.sum() if num_items is None else num_items
            divisor = count.to(device=hidden.device, dtype=loss_dtype)
        # Finite without any token: zero gradients must not become NaN in the backward.
        inverse = (divisor.clamp(min=1.0) if num_items is None else divisor).reciprocal()
        sums = _empty_sums(hidden, weight, wanted, dtype, settings)
        late = dtype == torch.float16 and (sums.weight is None or sums.weight.dtype != dtype)
        scale = torch.ones_like(inverse) if late else inverse
        loss = _run_chunks(
            hidden,
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            labels=labels,
            row_scale=torch.where(valid, scale, 0.0) if any(wanted) else None,  # [tokens]
            settings=settings,
            sums=sums,
        )
        for total in (sums.weight, sums.bias):
            if late and total is not None:
                total.mul_(inverse)
        gradients = _Gradients(
            hidden=sums.hidden,
            weight=None if sums.weight is None else sums.weight.to(weight.dtype),
            bias=None if sums.bias is None or bias is None else sums.bias.to(bias.dtype),
        )
        return loss / divisor, gradients, inverse if late else None


def _empty_sums(
    hidden: Tensor,
    weight: Tensor,
    wanted: tuple[bool, ...],
    dtype: torch.dtype,
    settings: _Settings,
) -> _Gradients:
    # One product sums in fp32 by itself; float16 needs the wide sum, which is not divided by N yet.
    one_product = hidden.shape[0] <= settings.chunk_tokens and dtype != torch.float16
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight_dtype = weight.dtype if one_product or settings.accumulate == "weight" else wide
    return _Gradients(
        hidden=hidden.new_empty(hidden.shape, dtype=dtype) if wanted[0] else None,
        weight=weight.new_zeros(weight.shape, dtype=weight_dtype) if wanted[1] else None,
        bias=weight.new_zeros(weight.shape[0], dtype=wide) if wanted[2] else None,
    )


def _run_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    row_scale: Tensor | None,
    settings: _Settings,
    sums: _Gradients,
) -> Tensor:
    """Return the summed loss, and leave the gradients in ``sums``."""
    loss = hidden.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))
    for start in range(0, hidden.shape[0], settings.chunk_tokens):
        chunk = slice(start, start + settings.chunk_tokens)
        chunk_hidden = hidden[chunk].to(weight.dtype)
        logits = functional.linear(chunk_hidden, weight, bias)  # [chunk, vocab]
        loss += cross_entropy_(
            logits,
            labels[chunk],
            row_scale=None if row_scale is None else row_scale[chunk],
            ignore_index=settings.ignore_index,
            logit_scale=settings.logit_scale,
            softcap=settings.softcap,
        )
        if sums.hidden is not None:
            torch.mm(logits, weight, out=sums.hidden[chunk])
        if sums.weight is not None:
            add_product_(sums.weight, logits, chunk_hidden)
        if sums.bias is not None:
            sums.bias.add_(logits.sum(dim=0, dtype=sums.bias.dtype))
        del logits, chunk_hidden  # or two chunks would live at once
    return loss
