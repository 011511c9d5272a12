"""Scores of a backbone's weights on data: the Fisher information's diagonal, summed by channel.

For a linear weight W [out, in] of a block and probe batches with losses L,

    F = mean over batches of (dL/dW)²,   rows_i = Σ_j F_ij,   columns_j = Σ_i F_ij

with dL/dW = dYᵀ X, from what the layer was given (X) and what came back (dY): so the score of a
packed weight is that of its dense one, of which nothing but the layer's own products is made. A
layer that runs several times in a forward counts each run by itself.

Bytes: rows and columns in fp32. While a batch is scored, beside what the model makes outside its
blocks: the input of every block, what one block computes, and one weight's gradient in fp32, at
most. Blocks run again in backward; every gradient is squared, summed and freed before the next.
Time: about four forwards a batch, and the products dYᵀ X of all weights.

Source: the empirical Fisher of LST (arXiv 2206.06522, section 3.3), whose code holds gradients and
scores of all weights at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memrt.kernels.finite import all_finite
from memrt.kernels.mixed_precision import block_rows
from memrt.ladder.probing import probe_batches, resting_model
from memrt.surgery import subclass_of

if TYPE_CHECKING:
    from memrt.session import Session

__all__ = ["Scores", "fisher_scores"]

Scores: TypeAlias = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""For a linear module, rows [out] and columns [in]."""

_Kind: TypeAlias = Any  # a module's class: mypy does not take those for hashable


def fisher_scores(
    run: Session, blocks: Sequence[nn.Module], weights: Collection[nn.Module], *, count: int
) -> Scores:
    """Score the linear modules `weights` of `blocks` on `count` batches of the run's probe set.

    No parameter may require a gradient before the last block. Modes, classes and the random numbers
    are left as they were.
    """
    batches = probe_batches(run, count, init="fisher")
    totals = {module: _Total() for module in weights}
    with run.phase("probe"), torch.enable_grad(), resting_model(run.model):
        for batch in batches:
            with _scoring(blocks, totals) as roots:
                loss = run.loss(batch)
                if not all_finite([loss.detach()]):
                    raise ValueError(
                        f"init='fisher': the loss on a probe batch is {float(loss.detach())}; "
                        "leave rows without labels out of the probe set"
                    )
                torch.autograd.grad(loss, roots, allow_unused=True)
                del loss
    names = {module: name for name, module in run.model.named_modules()}
    for module, total in totals.items():
        if total.rows is None:
            raise ValueError(
                f"init='fisher': the weight of {names[module]} is read without calling the module, "
                "so that it has no score; use init='magnitude'"
            )
    return {module: total.scores(len(batches)) for module, total in totals.items()}


class _Total:
    """Rows and columns of one weight, summed over calls and batches."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """Add (gradientᵀ x)², for gradient [..., out] and x [..., in]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.reshape(-1, x.shape[-1]).to(dtype)  # [tokens, in]
        gradient = gradient.reshape(-1, gradient.shape[-1])  # [tokens, out]
        if self.rows is None or self.columns is None:
            self.rows, self.columns = (
                torch.zeros(width, dtype=dtype, device=x.device)
                for width in (gradient.shape[1], x.shape[1])
            )
        size = block_rows(x.shape[1], gradient.shape[1])
        for rows, piece in zip(
            torch.split(self.rows, size), torch.split(gradient, size, dim=1), strict=True
        ):
            squared = (piece.t().to(dtype) @ x).square_()
            rows += squared.sum(dim=1)
            self.columns += squared.sum(dim=0)

    def scores(self, num_batches: int) -> tuple[Tensor, Tensor]:
        """The means over batches."""
        assert self.rows is not None
        assert self.columns is not None
        return self.rows / num_batches, self.columns / num_batches


class _Scored(torch.autograd.Function):
    """A linear module's output as it is; on the way back the weight is scored."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, total: _Total) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(x)
        return output.clone()  # a view could not be changed in place, as some activations do

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.total.add(gradient, x)
        return gradient, None, None


@contextmanager
def _scoring(
    blocks: Sequence[nn.Module], totals: Mapping[nn.Module, _Total]
) -> Iterator[list[Tensor]]:
    """Blocks that run again in backward, and weights that are scored in it.

    Yields the list of hidden states from which a graph begins, to be filled by a forward.
    """
    roots: list[Tensor] = []
    kinds: dict[nn.Module, _Kind] = {block: type(block) for block in blocks}
    hooks = [module.register_forward_hook(_hook(total)) for module, total in totals.items()]
    try:
        for block, kind in kinds.items():
            block.__class__ = _rerunning(kind)
            vars(block)["memrt_roots"] = roots
        yield roots
    finally:
        for hook in hooks:
            hook.remove()
        for block, kind in kinds.items():
            block.__class__ = kind
            vars(block).pop("memrt_roots", None)


def _hook(total: _Total) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        result: Any = _Scored.apply
        scored: Tensor = result(output, given[0].detach(), total)
        return scored

    return hook


@cache
def _rerunning(kind: _Kind) -> type[nn.Module]:
    """A block that keeps its input alone, and without one that needs a gradient begins a graph."""
    plain = kind.forward
    first = tuple(inspect.signature(plain).parameters)[1]

    class Rerunning:
        memrt_roots: list[Tensor]

        @wraps(plain)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            # the block would write a key-value cache twice
            args = tuple(None if hasattr(v, "get_seq_length") else v for v in args)
            kwargs = {n: None if hasattr(v, "get_seq_length") else v for n, v in kwargs.items()}
            hidden = args[0] if args else kwargs.pop(first)
            if not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
                self.memrt_roots.append(hidden)

            def again(hidden: Tensor) -> Any:
                return plain(self, hidden, *args[1:], **kwargs)

            return checkpoint(again, hidden, use_reentrant=False, preserve_rng_state=False)

    return subclass_of(kind, Rerunning)
