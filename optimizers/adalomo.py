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

Bytes of state: 4 (rows + columns) a matrix, 4 an element of a vector, and a step counter of 4. All
arithmetic is fp32; three sweeps over pieces of whole rows need temporaries of a few fp32 pieces of
`PIECE_ELEMENTS` elements, not of the weight. Nothing is read to the host.

Source: Lv et al., "AdaLomo: Low-memory Optimization with Adaptive Learning Rate", arXiv 2310.10195.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from memrt.optimizers.parameterwise import ParameterwiseOptimizer, check_not_negative

__all__ = ["AdaLomo"]

PIECE_ELEMENTS = 2**22


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
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
        }
        super().__init__(params, defaults)

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
        rows = parameter.shape[0]
        columns = parameter[:1].numel()
        return {"step": (), "exp_avg_sq_row": (rows,), "exp_avg_sq_col": (columns,)}

    def _step_one(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        if not parameter.numel():
            return
        state["step"].add_(1)
        fresh = state["step"].pow(group["decay_rate"])  # w_t
        if parameter.ndim < 2:
            parameter, gradient = parameter.view(1, -1), gradient.view(1, -1)
            _average(state, "exp_avg_sq", gradient.float().square() + group["eps"][0], fresh)
        else:
            _accumulate_factors(gradient, state, fresh, group["eps"][0])
        squares = torch.zeros(2, dtype=torch.float32, device=parameter.device)
        for rows in _pieces(gradient):
            squares[0] += _direction(gradient, rows, state).square().sum()
            squares[1] += parameter[rows].float().square().sum()
        rms_update, rms_weight = (squares / parameter.numel()).sqrt().unbind()
        step_size = group["lr"] * rms_weight.clamp(min=group["eps"][1])
        along = step_size / (rms_update / group["clip_threshold"]).clamp(min=1.0)
        for rows in _pieces(gradient):
            weight = parameter[rows]
            update = _direction(gradient, rows, state).mul_(along).view(weight.shape)
            if group["weight_decay"]:
                update.add_(weight.float() * (step_size * group["weight_decay"]))
            weight.sub_(update)


def _average(state: dict[str, Tensor], key: str, value: Tensor, fresh: Tensor) -> None:
    state[key].lerp_(value.view_as(state[key]), fresh)


def _pieces(gradient: Tensor) -> Iterator[slice]:
    """Slices of whole rows."""
    num_rows = max(1, PIECE_ELEMENTS // max(1, gradient[:1].numel()))
    for start in range(0, gradient.shape[0], num_rows):
        yield slice(start, min(start + num_rows, gradient.shape[0]))


def _accumulate_factors(
    gradient: Tensor, state: dict[str, Tensor], fresh: Tensor, eps: float
) -> None:
    row_means = torch.empty_like(state["exp_avg_sq_row"])
    column_sums = torch.zeros_like(state["exp_avg_sq_col"])
    for rows in _pieces(gradient):
        squared = gradient[rows].float().flatten(1).square() + eps  # [rows of the piece, columns]
        row_means[rows] = squared.mean(dim=1)
        column_sums += squared.sum(dim=0)
    _average(state, "exp_avg_sq_row", row_means, fresh)
    _average(state, "exp_avg_sq_col", column_sums / gradient.shape[0], fresh)


def _direction(gradient: Tensor, rows: slice, state: dict[str, Tensor]) -> Tensor:
    """U of a piece, before its RMS is bounded."""
    piece = gradient[rows].to(torch.float32, copy=True).flatten(1)
    if "exp_avg_sq" in state:
        return piece.mul_(state["exp_avg_sq"].view(1, -1).rsqrt())
    row = state["exp_avg_sq_row"]
    piece.mul_((row[rows] / row.mean()).rsqrt().unsqueeze(1))
    return piece.mul_(state["exp_avg_sq_col"].rsqrt())
