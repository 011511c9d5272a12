"""LOMO's update rule: stochastic gradient descent without any state.

    g <- clamp(g, -clip_value, clip_value)          where clip_value is set
    W <- W * (1 - lr * weight_decay)
    W <- W - lr * g

as torch.optim.SGD does for weight_decay = 0, with its bits in fp32, and in bf16 to the nearest.
bf16 is computed in fp32 and rounded once, stochastically (`memrt.optimizers.parameterwise`); to the
nearest it is rounded twice with decay. State: none. Temporaries: none, for stochastic rounding 4
bytes an element of a piece of at most `PIECE_ELEMENTS` (a weight that is not contiguous: whole).
Memory is LOMO's when the update runs in backward (`memrt.strategies.lomo`), which this optimizer
alone does not do.

Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources",
arXiv 2306.09782.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.optimizers.parameterwise import ParameterwiseOptimizer

__all__ = ["Lomo"]

PIECE_ELEMENTS = 2**22


class Lomo(ParameterwiseOptimizer):
    """Descent along the gradient; `clip_value` bounds every element of it (None: no bound)."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 3e-2,
        weight_decay: float = 0.0,
        clip_value: float | None = None,
        stochastic_rounding: bool = True,
        rounding_seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "clip_value": clip_value},
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        bound = group["clip_value"]
        if bound is not None and not bound > 0:
            raise ValueError(f"clip_value={bound!r} must be above 0, or None for no bound")

    def _layout(self, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        return {}

    def _step_one(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: Rounding | None,
    ) -> None:
        if group["clip_value"] is not None:
            gradient.clamp_(-group["clip_value"], group["clip_value"])
        if rounding is None:
            _descend(parameter, gradient, group)
            return
        for piece, share, first_index in _pieces(parameter, gradient):
            wide = piece.float()
            _descend(wide, share, group)
            stochastic_copy_(piece, wide, rounding=rounding, first_index=first_index)
            del wide  # or the next piece is made beside it


def _descend(weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(gradient, alpha=-group["lr"])


def _pieces(weight: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Pieces of both, and where they begin."""
    if not (weight.is_contiguous() and gradient.is_contiguous()):
        yield weight, gradient, 0
        return
    flat, share = weight.detach().view(-1), gradient.view(-1)
    for start in range(0, flat.numel(), PIECE_ELEMENTS):
        part = slice(start, start + PIECE_ELEMENTS)
        yield flat[part], share[part], start
