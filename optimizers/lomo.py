"""LOMO's update rule: stochastic gradient descent without any state.

    g <- clamp(g, -clip_value, clip_value)          where clip_value is set
    W <- W * (1 - lr * weight_decay)
    W <- W - lr * g

as torch.optim.SGD does for weight_decay = 0, with its bits in fp32 and bf16 (bf16 is computed in
fp32 and rounded once; twice with decay). State: none. Temporaries: none. Memory is LOMO's when the
update runs in backward (`memrt.strategies.lomo`), which this optimizer alone does not do.

Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources",
arXiv 2306.09782.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from memrt.optimizers.parameterwise import ParameterwiseOptimizer

__all__ = ["Lomo"]


class Lomo(ParameterwiseOptimizer):
    """Descent along the gradient; `clip_value` bounds every element of it (None: no bound)."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 3e-2,
        weight_decay: float = 0.0,
        clip_value: float | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "clip_value": clip_value})

    def _check_group(self, group: dict[str, Any]) -> None:
        bound = group["clip_value"]
        if bound is not None and not bound > 0:
            raise ValueError(f"clip_value={bound!r} must be above 0, or None for no bound")

    def _layout(self, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        return {}

    def _step_one(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        if group["clip_value"] is not None:
            gradient.clamp_(-group["clip_value"], group["clip_value"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(gradient, alpha=-group["lr"])
