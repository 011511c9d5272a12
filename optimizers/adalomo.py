"""AdaLomo's update rule: a factored second moment, and an update normalised for each parameter.

For a parameter W [rows, columns] (more dimensions: all but the first are flattened) with gradient
G at its own step t = 1, 2, ...:

    w_t = t^decay_rate, decay_rate = -0.8                     (so 1 at t = 1: no bias correction)
    r <- (1 - w_t) r + w_t mean_columns(G² + eps_1)           [rows]
    c <- (1 - w_t) c + w_t mean_rows(G² + eps_1)              [columns]
    U = G / sqrt(r cᵀ / mean(r)),    U <- U / max(1, RMS(U) / clip_threshold)
    s = lr * max(eps_2, RMS(W)),     W <- W (1 - s * weight_decay) - s U

A parameter of one dimension keeps its whole second moment v in place of r and c. RMS(U) and RMS(W)
are taken over the parameter ("grouped update normalisation"), so that no other gradient is needed
and the update can run in backward.

A stack of E matrices [E, m, n], such as fused experts, is E parameters, with r [E, m], c [E, n] and
norms of its own for each: the same steps as of experts that are modules. What keeps less flattened,
E + m n <= E (m + n), such as a convolution over one dimension, is flattened.

Bytes of state: 4 (rows + columns) a matrix, 4 an element of a vector, and a step counter of 4. The
step is one operator of three sweeps for each matrix, all in fp32, whose temporaries do not grow
with the weight (`memrt.kernels.adalomo`). bf16 weights are rounded once, stochastically
(`memrt.optimizers.parameterwise`). Nothing is read to the host.

Source: Lv et al., "AdaLomo: Low-memory Optimization with Adaptive Learning Rate", arXiv 2310.10195.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from memrt.kernels.adalomo import adalomo_
from memrt.kernels.stochastic_rounding import Rounding
from memrt.optimizers.parameterwise import ParameterwiseOptimizer, check_not_negative

__all__ = ["AdaLomo"]


class AdaLomo(ParameterwiseOptimizer):
    """Adafactor without momentum, with a relative step; the defaults are the authors'.

    eps: what is added to squared gradients, and the smallest RMS(W) that scales the step.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        stochastic_rounding: bool = True,
        rounding_seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
        }
        super().__init__(
            params,
            defaults,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        if len(group["eps"]) != 2:
            raise ValueError(f"eps={group['eps']!r} must be two numbers")
        for value in group["eps"]:
            check_not_negative("eps", value)
        if not group["clip_threshold"] > 0:
            raise ValueError(f"clip_threshold={group['clip_threshold']!r} must be above 0")
        if not -1 <= group["decay_rate"] < 0:
            raise ValueError(f"decay_rate={group['decay_rate']!r} must lie in [-1, 0)")

    def _layout(self, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        if parameter.ndim < 2:
            return {"step": (), "exp_avg_sq": tuple(parameter.shape)}
        if _is_stack(parameter):
            matrices, rows, columns = parameter.shape
            row, column = (matrices, rows), (matrices, columns)
            return {"step": (), "exp_avg_sq_row": row, "exp_avg_sq_col": column}
        rows = parameter.shape[0]
        columns = parameter[:1].numel()
        return {"step": (), "exp_avg_sq_row": (rows,), "exp_avg_sq_col": (columns,)}

    def _step_one(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: Rounding | None,
    ) -> None:
        if not parameter.numel():
            return
        state["step"].add_(1)
        fresh = state["step"].pow(group["decay_rate"])  # w_t
        names = ("lr", "weight_decay", "eps", "clip_threshold")
        settings: dict[str, Any] = {name: group[name] for name in names}
        if parameter.ndim < 2:
            whole = state["exp_avg_sq"]
            adalomo_(parameter, gradient, None, whole, fresh, rounding=rounding, **settings)
            return
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        if not _is_stack(parameter):
            adalomo_(parameter, gradient, row, column, fresh, rounding=rounding, **settings)
            return
        for index in range(parameter.shape[0]):
            adalomo_(
                parameter[index],
                gradient[index],
                row[index],
                column[index],
                fresh,
                rounding=_of_matrix(rounding, index),
                **settings,
            )


def _is_stack(parameter: Tensor) -> bool:
    """Whether its matrices are factored one by one, which keeps less than to flatten them."""
    if parameter.ndim != 3:
        return False
    matrices, rows, columns = parameter.shape
    return matrices * (rows + columns) < matrices + rows * columns


def _of_matrix(rounding: Rounding | None, index: int) -> Rounding | None:
    """Random bits of its own: its elements are counted from 0 like another's."""
    if rounding is None:
        return None
    return Rounding((rounding.key[0], rounding.key[1] ^ index), rounding.step)
