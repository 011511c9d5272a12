"""An operator's results and gradients beside plain PyTorch's, both against fp64.

The error of a result is ‖result - truth‖ / ‖truth‖; the operator's must be at most twice plain
PyTorch's in the same dtype, plus the dtype's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import Setting

__all__ = [
    "Loss",
    "Named",
    "codes_row",
    "compare",
    "error",
    "leaves_of",
    "rounded",
    "three",
    "with_gradients",
]

FACTOR = 2.0
MOST_DIFFERENT = 1e-3

Named = Mapping[str, Tensor]


def error(result: Tensor, truth: Tensor) -> float:
    """‖result - truth‖ / ‖truth‖."""
    truth = truth.detach()
    difference = (result.detach().cpu().double() - truth).norm()
    return float(difference / truth.norm().clamp(min=1e-30))


def compare(
    ours: Named,
    plain: Named,
    truth: Named,
    *,
    rounding: float,
    coarse: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A row: the error of every result, and whether all are as small as plain PyTorch's.

    `coarse` is the rounding of results that the operator keeps in fewer bits, by name.
    """
    slack = dict.fromkeys(truth, rounding) | dict(coarse or {})
    errors = {
        name: {"ours": error(ours[name], truth[name]), "plain": error(plain[name], truth[name])}
        for name in truth
    }
    # written so that NaN, which compares as false, does not pass
    wrong = [
        name
        for name, each in errors.items()
        if not each["ours"] <= FACTOR * each["plain"] + slack[name]
    ]
    return {
        "status": "failed" if wrong else "passed",
        "reason": ", ".join(wrong) or None,
        "errors": errors,
    }


def leaves_of(inputs: Named, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs that take gradients."""
    return {
        name: value.to(device=device, dtype=dtype).requires_grad_(True)
        for name, value in inputs.items()
    }


Loss = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def with_gradients(compute: Loss, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results, and the gradients of their first one summed against fixed weights."""
    results = compute(leaves)
    first = next(iter(results.values()))
    if first.dim():
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(first.shape, generator=generator).to(first.device, first.dtype)
        first = (first * weights).sum()
    first.backward()
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {**results, **gradients}


def rounded(inputs: Named, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs that the dtype can hold, so that all three computations get the same ones."""
    return {name: value.to(dtype).double() for name, value in inputs.items()}


def three(
    setting: Setting,
    dtype: torch.dtype,
    inputs: Named,
    ours: Loss,
    plain: Loss,
    *,
    coarse: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The operator on the device, plain PyTorch there, and in fp64 on the CPU."""
    return compare(
        with_gradients(ours, leaves_of(inputs, setting.device, dtype)),
        with_gradients(plain, leaves_of(inputs, setting.device, dtype)),
        with_gradients(plain, leaves_of(inputs, torch.device("cpu"), torch.float64)),
        rounding=torch.finfo(dtype).eps,
        coarse=coarse,
    )


def codes_row(
    errors: Mapping[str, float], allowed: Mapping[str, float], different: Mapping[str, float]
) -> dict[str, Any]:
    """A row of what is kept in codes: errors, and the share of codes that are not the CPU's.

    Sums in another order may move a code at a boundary; a thousandth is far more than that does.
    """
    wrong = [name for name, value in errors.items() if not value <= allowed[name]]
    wrong += [name for name, share in different.items() if not share <= MOST_DIFFERENT]
    return {
        "status": "failed" if wrong else "passed",
        "reason": ", ".join(wrong) or None,
        "errors": {name: {"ours": value} for name, value in errors.items()},
        "different_codes": dict(different),
    }
