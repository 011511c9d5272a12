"""Starts of LoRA that take something out of the weights, and its return when the adapters leave.

PiSSA, OLoRA, CorDA and LoRA-GA begin at B0 A0 other than nothing and leave W - s B0 A0 in the
layer; LoftQ leaves W rounded, and KaSA without its smallest directions. Kept on the host until
then: B0 and A0, r · (in + out) numbers a layer; of LoftQ and KaSA the weights. So W comes back as
it was, but for the rounding of that sum, which is in fp32, and of the adapters: PEFT rounds those
of bf16 and fp16 weights to their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memrt.adapter_reach import adapter_layers

__all__ = ["Taken", "give_back", "parts_taken", "weights_at_risk"]

_LOW_RANK = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """What a start took out of one layer's weight."""

    layer: Any
    weight: Tensor | None = None
    """The weight as it was, where it cannot be told."""
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    transposed: bool = False
    """Whether the weight is [in, out]."""

    def whole(self, weight: Tensor) -> Tensor:
        """The layer's weight from before, in float32."""
        if self.a is None or self.b is None:
            assert self.weight is not None
            return self.weight
        part = self.scaling * (self.b.to(weight.device) @ self.a.to(weight.device))
        return weight.float() + (part.t() if self.transposed else part)


def _start(config: Any) -> str:
    start = getattr(config, "init_lora_weights", None)
    return start.lower() if isinstance(start, str) else ""


def _is_lost(config: Any) -> bool:
    """Whether nothing that stays tells what the weights were."""
    return _start(config) == "loftq" or getattr(config, "kasa_config", None) is not None


def weights_at_risk(config: Any, model: nn.Module) -> dict[nn.Module, Tensor]:
    """Copies on the host of the weights that LoftQ or KaSA may change; other starts need none."""
    if not _is_lost(config):
        return {}
    found = {module: getattr(module, "weight", None) for module in model.modules()}
    return {
        module: weight.detach().to("cpu", copy=True)
        for module, weight in found.items()
        if isinstance(weight, nn.Parameter) and weight.ndim == 2
    }


def parts_taken(
    config: Any, model: nn.Module, weights: dict[nn.Module, Tensor], *, adapter: str
) -> tuple[Taken, ...]:
    """What the start of a model's adapters, which are as they began, took out of its weights."""
    layers = [layer for _, layer in adapter_layers(model)]
    start = _start(config)
    if _is_lost(config):
        return tuple(
            Taken(layer=layer, weight=weights[layer.get_base_layer()])
            for layer in layers
            if layer.get_base_layer() in weights
        )
    if not start.startswith(_LOW_RANK):
        return ()
    return tuple(
        Taken(
            layer=layer,
            a=layer.lora_A[adapter].weight.detach().to("cpu", torch.float32, copy=True),
            b=layer.lora_B[adapter].weight.detach().to("cpu", torch.float32, copy=True),
            scaling=layer.scaling[adapter],
            # OLoRA takes the weight as it lies
            transposed=bool(layer.fan_in_fan_out) and start != "olora",
        )
        for layer in layers
        if adapter in layer.lora_A
    )


@torch.no_grad()
def give_back(parts: Sequence[Taken]) -> None:
    """Put back what was taken, where the adapters were not folded into the weights."""
    for part in parts:
        if not part.layer.merged:
            parameter = part.layer.get_base_layer().weight
            parameter.copy_(part.whole(parameter))
