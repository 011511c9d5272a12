"""States, settings and calls for the tests of the FP8 AdamW step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memrt.kernels.adamw_fp8 import adamw_fp8
from memrt.kernels.expanded_fp8 import dequantize_expanded_reference, num_groups

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
KEY = [123456789, 987654321]


def new_state(num_elements: int) -> dict[str, Tensor]:
    """As the format makes it: zeros."""
    groups = num_groups(num_elements)
    return {
        "exp_avg_codes": torch.zeros(num_elements, dtype=torch.uint8),
        "exp_avg_sq_codes": torch.zeros(num_elements, dtype=torch.uint8),
        "exp_avg_largest": torch.zeros(groups),
        "exp_avg_sq_largest": torch.zeros(groups),
        "exp_avg_power": torch.zeros(groups, dtype=torch.uint8),
        "exp_avg_sq_power": torch.zeros(groups, dtype=torch.uint8),
    }


def moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both moments [n] that a state stands for."""
    found = []
    for name, positive in (("exp_avg", False), ("exp_avg_sq", True)):
        codes = state[f"{name}_codes"].flatten()
        n = codes.numel()
        padded = torch.zeros(num_groups(n) * 128, dtype=torch.uint8)
        padded[:n] = codes
        values = dequantize_expanded_reference(
            padded.view(-1, 128),
            state[f"{name}_largest"],
            state[f"{name}_power"],
            positive=positive,
        )
        found.append(values.flatten()[:n])
    return found[0], found[1]


def gradient_of(num_elements: int, seed: int) -> Tensor:
    """Log-normal magnitudes times signs: what gradients of a layer look like."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(num_elements, generator=generator))
    return torch.randn(num_elements, generator=generator) * scale


def trained(
    num_elements: int, *, dtype: torch.dtype = torch.float32, num_steps: int = 3
) -> tuple[Tensor, dict[str, Tensor]]:
    """A parameter and its state after a few steps."""
    parameter = torch.randn(num_elements, generator=torch.Generator().manual_seed(1)).to(dtype)
    state = new_state(num_elements)
    for step in range(1, num_steps + 1):
        gradient = gradient_of(num_elements, step).to(dtype)
        adamw_fp8(parameter, gradient, **state, step=torch.tensor(float(step)), **SETTINGS)
    return parameter, state


def copy_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """A copy with tensors of its own."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def call_of(
    num_elements: int, *, dtype: torch.dtype, key: list[int] | None = None, broken: bool = False
) -> dict[str, Any]:
    """The arguments of a fourth step; `broken`: its gradient has a NaN and an infinity."""
    parameter, state = trained(num_elements, dtype=dtype)
    gradient = gradient_of(num_elements, 9).to(dtype)
    if broken:
        gradient[0], gradient[num_elements // 2] = torch.inf, torch.nan
    step = torch.tensor(4.0)
    return {
        "parameter": parameter,
        "gradient": gradient,
        **state,
        "step": step,
        **SETTINGS,
        "rounding_key": key,
    }
