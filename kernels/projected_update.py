"""The step of a weight that moves by a low-rank product: the product is never formed.

For W [m, n], two fp32 factors left [m, r] and right [r, n], and perhaps a gradient G [m, n] with a
factor for each of its columns [n] or rows [m]:

    W <- decay · W + alpha · left @ right (+ gradient_alpha · G diag(factors))

in fp32 (float64 for float64), rounded once: a bf16 W stochastically where a ``rounding`` is given,
with the bits of ``stochastic_rounding``, to the nearest otherwise.

Bytes: with Triton none, W is read and written once. In PyTorch a narrow W, and a narrow G, is
widened some rows at a time, 4 bytes for each of PIECE_ELEMENTS elements, and stochastic rounding
takes what it takes; fp32 ones are not copied.

Source: the lifted step of GaLore (arXiv 2403.03507) and Fira's (arXiv 2410.01623), in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memrt.kernels import stochastic_rounding
from memrt.kernels.dispatch import uses_triton
from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.profiling.ledger import register_workspace

__all__ = ["ScaledAddend", "projected_update_", "projected_update_reference"]


PIECE_ELEMENTS = 2**20  # on the CPU: enough rows for a product, and 4 MiB


class ScaledAddend(NamedTuple):
    """alpha · G diag(factors), which is added to a weight."""

    gradient: Tensor
    """G [m, n], of any floating dtype."""
    factors: Tensor
    """fp32 [n] with ``by_column``, else [m]."""
    alpha: float
    by_column: bool


def projected_update_reference(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    alpha: float,
    decay: float = 1.0,
    addend: ScaledAddend | None = None,
) -> Tensor:
    """W of the formula at the top of this file, not rounded. For reading and for tests."""
    result = decay * weight.to(left.dtype) + alpha * (left @ right)
    if addend is not None:
        scale = addend.factors if addend.by_column else addend.factors[:, None]
        result = result + addend.alpha * addend.gradient.to(left.dtype) * scale
    return result


def projected_update_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    alpha: float,
    decay: float = 1.0,
    addend: ScaledAddend | None = None,
    rounding: Rounding | None = None,
) -> None:
    """Change ``weight`` by the formula; ``rounding`` is for bf16 weights alone."""
    gradient, factors, gradient_alpha, by_column = addend or (None, None, 0.0, False)
    key, step = ([], None) if rounding is None else (list(rounding.key), rounding.step)
    _projected_update(
        weight,
        left,
        right,
        alpha,
        decay,
        gradient,
        factors,
        gradient_alpha,
        by_column,
        step,
        key,
    )


@torch.library.custom_op("memrt::projected_update", mutates_args=("weight",))
def _projected_update(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float,
    decay: float,
    gradient: Tensor | None,
    factors: Tensor | None,
    gradient_alpha: float,
    by_column: bool,
    step: Tensor | None,
    rounding_key: Sequence[int],
) -> None:
    _check(weight, left, right, gradient, factors, by_column, step)
    if uses_triton(weight) and weight.dtype != torch.float64:
        from memrt.kernels._triton.projected_update import launch

        addend = (gradient, factors, gradient_alpha, by_column)
        launch(weight, left, right, alpha, decay, *addend, step, *(rounding_key or (0, 0)))
        return
    rows = _piece_rows(weight, gradient)
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        target = weight[part]
        wide = target.to(_wide(weight))
        if decay != 1.0:
            wide.mul_(decay)
        wide.addmm_(left[part].to(wide.dtype), right.to(wide.dtype), alpha=alpha)
        if gradient is not None and factors is not None:
            scale = factors if by_column else factors[part, None]
            wide.addcmul_(gradient[part].to(wide.dtype), scale.to(wide.dtype), value=gradient_alpha)
        if step is not None:
            rounding = Rounding((rounding_key[0], rounding_key[1]), step)
            first = start * weight.shape[1]
            stochastic_copy_(target, wide, rounding=rounding, first_index=first)
        elif wide is not target:
            target.copy_(wide)
        del wide


@_projected_update.register_fake
def _(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float,
    decay: float,
    gradient: Tensor | None,
    factors: Tensor | None,
    gradient_alpha: float,
    by_column: bool,
    step: Tensor | None,
    rounding_key: Sequence[int],
) -> None:
    _check(weight, left, right, gradient, factors, by_column, step)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _widened(weight: Tensor, gradient: Tensor | None) -> list[Tensor]:
    """What is copied piece by piece because it is narrower than the arithmetic."""
    given = [weight] if gradient is None else [weight, gradient]
    return [x for x in given if x.dtype != _wide(weight)]


def _piece_rows(weight: Tensor, gradient: Tensor | None) -> int:
    if not _widened(weight, gradient):
        return max(1, weight.shape[0])
    return max(1, PIECE_ELEMENTS // max(1, weight.shape[1]))


def workspace_bytes(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float,
    decay: float,
    gradient: Tensor | None,
    factors: Tensor | None,
    gradient_alpha: float,
    by_column: bool,
    step: Tensor | None,
    rounding_key: Sequence[int],
) -> int:
    """The most bytes of temporaries that are alive at once inside the operator."""
    if uses_triton(weight) and weight.dtype != torch.float64:
        return 0
    num_rows = min(_piece_rows(weight, gradient), weight.shape[0])
    element_bytes = _wide(weight).itemsize
    piece_bytes = num_rows * weight.shape[1] * element_bytes
    num_bytes = len(_widened(weight, gradient)) * piece_bytes
    if element_bytes > 4:  # the factors are widened too
        num_bytes += element_bytes * (left.numel() + right.numel())
        num_bytes += 0 if factors is None else element_bytes * factors.numel()
    if step is not None:  # when the gradient's piece is gone
        piece = torch.empty(num_rows, weight.shape[1], dtype=weight.dtype, device="meta")
        rounded = piece_bytes + stochastic_rounding.workspace_bytes(piece, piece)
        num_bytes = max(num_bytes, rounded)
    return num_bytes


register_workspace("memrt::projected_update", workspace_bytes)


def _check(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    gradient: Tensor | None,
    factors: Tensor | None,
    by_column: bool,
    step: Tensor | None,
) -> None:
    shape, rank = tuple(weight.shape), left.shape[1]
    if shape != (left.shape[0], right.shape[1]) or rank != right.shape[0]:
        raise ValueError(
            f"weight is {shape}, left {tuple(left.shape)} and right {tuple(right.shape)}: "
            "give [m, n], [m, r] and [r, n]"
        )
    for name, tensor in (("left", left), ("right", right), ("factors", factors)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}: give fp32")
    if gradient is not None and factors is not None:
        expected = (shape[1] if by_column else shape[0],)
        if tuple(gradient.shape) != shape or tuple(factors.shape) != expected:
            raise ValueError(
                f"the gradient is {tuple(gradient.shape)} and its factors {tuple(factors.shape)}: "
                f"give {shape} and {expected}"
            )
    if step is not None and weight.dtype is not torch.bfloat16:
        raise ValueError(f"weight is {weight.dtype}: stochastic rounding is for bf16 weights")
