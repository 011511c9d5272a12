"""Moments in few bits: int8 by bitsandbytes' map, FP8 with expanded range, 4 bits.

Parameters with fewer than 4096 elements keep fp32 moments (bitsandbytes' rule: norms and biases are
where few bits hurt, and are few).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from memrt.kernels.adamw_fp8_foreach import adamw_fp8_foreach
from memrt.kernels.adamw_int4 import adamw_int4, num_code_bytes
from memrt.kernels.adamw_int8 import adamw_int8
from memrt.kernels.adamw_step import num_groups
from memrt.kernels.dynamic_map import dynamic_map, num_blocks
from memrt.optimizers.state_format import AdamWSettings, StateFormat, StateTensor, Update

__all__ = ["MIN_QUANTIZED_ELEMENTS", "Fp8", "Int4", "Int8"]

MIN_QUANTIZED_ELEMENTS = 4096


class Int8(StateFormat):
    """Block-wise 8-bit moments: 2.03 bytes an element, see `memrt.kernels.adamw_int8`."""

    name: ClassVar[str] = "int8"
    min_elements: ClassVar[int] = MIN_QUANTIZED_ELEMENTS

    def __init__(self) -> None:
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def layout(self, shape: Sequence[int]) -> dict[str, StateTensor]:
        """Codes of the moments' shape, scales [num_blocks]; the step is read, so on the host."""
        blocks = (num_blocks(prod(shape)),)
        return {
            "step": StateTensor((), torch.float32, on_host=True),
            "exp_avg_codes": StateTensor(tuple(shape), torch.uint8),
            "exp_avg_sq_codes": StateTensor(tuple(shape), torch.uint8),
            "exp_avg_scales": StateTensor(blocks, torch.float32),
            "exp_avg_sq_scales": StateTensor(blocks, torch.float32),
        }

    def adamw(self, updates: Sequence[Update], settings: AdamWSettings) -> None:
        """One call of the operator for each parameter."""
        for parameter, gradient, state, rounding_key in updates:
            exp_avg_map, exp_avg_sq_map = self._maps_on(parameter.device)
            state["step"].add_(1)
            adamw_int8(
                parameter,
                gradient,
                state["exp_avg_codes"],
                state["exp_avg_sq_codes"],
                state["exp_avg_scales"],
                state["exp_avg_sq_scales"],
                exp_avg_map,
                exp_avg_sq_map,
                state["step"],
                settings.lr,
                settings.beta1,
                settings.beta2,
                settings.eps,
                settings.weight_decay,
                rounding_key,
            )

    def shared_tensors(self) -> list[Tensor]:
        """The code maps: 2 KiB for each device that was stepped on."""
        return [code_map for maps in self._maps.values() for code_map in maps]

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._maps:
            self._maps[device] = (
                torch.tensor(dynamic_map(signed=True), dtype=torch.float32, device=device),
                torch.tensor(dynamic_map(signed=False), dtype=torch.float32, device=device),
            )
        return self._maps[device]


class Fp8(StateFormat):
    """FP8 moments with expanded range: 2.08 bytes an element, see `memrt.kernels.adamw_fp8`."""

    name: ClassVar[str] = "fp8"
    min_elements: ClassVar[int] = MIN_QUANTIZED_ELEMENTS

    def layout(self, shape: Sequence[int]) -> dict[str, StateTensor]:
        """Codes of the moments' shape, magnitude and power [groups]; the step is read: on host."""
        groups = (num_groups(prod(shape)),)
        return {
            "step": StateTensor((), torch.float32, on_host=True),
            "exp_avg_codes": StateTensor(tuple(shape), torch.uint8),
            "exp_avg_sq_codes": StateTensor(tuple(shape), torch.uint8),
            "exp_avg_largest": StateTensor(groups, torch.float32),
            "exp_avg_sq_largest": StateTensor(groups, torch.float32),
            "exp_avg_power": StateTensor(groups, torch.uint8),
            "exp_avg_sq_power": StateTensor(groups, torch.uint8),
        }

    def adamw(self, updates: Sequence[Update], settings: AdamWSettings) -> None:
        """One call of the operator for all of them."""
        for update in updates:
            update.state["step"].add_(1)
        parts = (
            "exp_avg_codes",
            "exp_avg_sq_codes",
            "exp_avg_largest",
            "exp_avg_sq_largest",
            "exp_avg_power",
            "exp_avg_sq_power",
            "step",
        )
        adamw_fp8_foreach(
            [update.parameter for update in updates],
            [update.gradient for update in updates],
            *([update.state[name] for update in updates] for name in parts),
            settings.lr,
            settings.beta1,
            settings.beta2,
            settings.eps,
            settings.weight_decay,
            [word for update in updates for word in update.rounding_key or (-1, -1)],
        )


class Int4(StateFormat):
    """Block-wise 4-bit moments: 1.06 bytes an element, see `memrt.kernels.adamw_int4`."""

    name: ClassVar[str] = "int4"
    min_elements: ClassVar[int] = MIN_QUANTIZED_ELEMENTS

    def layout(self, shape: Sequence[int]) -> dict[str, StateTensor]:
        """Codes, two in a byte, and scales [blocks], all flat; the step is read, so on the host."""
        num_bytes, blocks = (num_code_bytes(prod(shape)),), (num_groups(prod(shape)),)
        return {
            "step": StateTensor((), torch.float32, on_host=True),
            "exp_avg_codes": StateTensor(num_bytes, torch.uint8),
            "exp_avg_sq_codes": StateTensor(num_bytes, torch.uint8),
            "exp_avg_scales": StateTensor(blocks, torch.float32),
            "exp_avg_sq_scales": StateTensor(blocks, torch.float32),
        }

    def adamw(self, updates: Sequence[Update], settings: AdamWSettings) -> None:
        """One call of the operator for each parameter."""
        for parameter, gradient, state, rounding_key in updates:
            state["step"].add_(1)
            adamw_int4(
                parameter,
                gradient,
                state["exp_avg_codes"],
                state["exp_avg_sq_codes"],
                state["exp_avg_scales"],
                state["exp_avg_sq_scales"],
                state["step"],
                settings.lr,
                settings.beta1,
                settings.beta2,
                settings.eps,
                settings.weight_decay,
                rounding_key,
            )
