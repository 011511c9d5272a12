"""The models, stacks and batches that plans, memory and speed are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import memrt
from benchmarks.gpu.common import Setting, stack_of
from benchmarks.shapes import llama_config
from memrt import registry
from memrt.measure import Workload
from memrt.planning import Plan, Shape, plan, random_batches
from memrt.strategy import Strategy
from memrt.structure import RunSettings
from memrt.testing import PARTNERS

__all__ = [
    "ADAPTERS",
    "DTYPE",
    "SETTINGS",
    "STACKS",
    "Model",
    "memory_models",
    "plan_for",
    "seventy_b_model",
    "seventy_b_stacks",
    "speed_model",
    "stacks",
    "strategies_of",
    "workload",
]

ADAPTERS = "peft(method='lora', rank=16, targets='all-linear')"
"""As in examples/70b_on_one_gpu.yaml."""

STACKS = (
    "none",
    "activation_checkpoint",
    "activation_checkpoint+fused_loss",
    "galore(rank=128)+activation_checkpoint+fused_loss",
    "lisa+activation_checkpoint+fused_loss",
    "lisa+int8_states",
    "activation_checkpoint+fused_loss+fp8_states",
    f"nf4+{ADAPTERS}+activation_checkpoint+fused_loss",
    "nf4+ladder(taps='pooled', checkpoint=True)+fp8_states+fused_loss",
    "activation_checkpoint+offload_activations",
    "offload_activations",
)
"""The slowest comes last: pinning the memory for it takes a while."""

CORE = tuple(STACKS[index] for index in (0, 2, 5, 6, 7, 8))
"""What is measured of every size."""

ALONE_SIZE = "0.5B"
"""Of this size every strategy is measured alone, or with its partners."""

CLIPPED = {"adalomo", "in_backward", "lomo"}
"""Steps in backward, which clip in a second pass."""

DTYPE = torch.bfloat16
SETTINGS = RunSettings(max_grad_norm=1.0, learning_rate=1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A size, and the batches that it is trained on."""

    size: str
    shape: Shape


def memory_models(setting: Setting) -> list[Model]:
    """Smallest first: if time runs out, the largest are missing."""
    if setting.tiny:
        return [Model(size="tiny", shape=Shape(sequence_length=32))]
    sizes = ("0.1B", "0.5B", "1B", "3B", "8B")
    return [Model(size=size, shape=Shape(sequence_length=2048)) for size in sizes]


def speed_model(setting: Setting) -> Model:
    """One size, with batches that keep a large card busy."""
    if setting.tiny:
        return Model(size="tiny", shape=Shape(sequence_length=32))
    return Model(size="1B", shape=Shape(batch_size=4, sequence_length=2048))


def seventy_b_model(setting: Setting) -> Model:
    """Llama 3's 70B shape, one sequence a step."""
    if setting.tiny:
        return Model(size="tiny", shape=Shape(sequence_length=32))
    return Model(size="70B", shape=Shape(sequence_length=2048))


def seventy_b_stacks(setting: Setting, *, packed: str = "nf4") -> dict[str, str]:
    """The two stacks of docs/70b-on-one-gpu.md; `packed` is the format of the frozen weights.

    The tiny shape is too narrow for a side network of a sixteenth.
    """
    reduction = 2 if setting.tiny else 16
    states = "int8_states" if packed == "nf4" else "fp8_states"
    side = f"reduction={reduction}, taps='projected', init='principal', checkpoint=True"
    return {
        "ladder": f"{packed}+ladder({side})+{states}+fused_loss",
        "adapters": f"{packed}+{ADAPTERS}+activation_checkpoint+fused_loss",
    }


def stacks(setting: Setting, size: str) -> Sequence[str]:
    """The stacks that a model of this size is measured with."""
    if setting.tiny:
        return ("none", STACKS[2], STACKS[6])
    if size == ALONE_SIZE:
        return ("none", *map(_alone, registry.names()))
    return STACKS if size in ("1B", "8B") else CORE


def _alone(name: str) -> str:
    """A strategy with its own defaults, and with what it needs beside it."""
    spec = f"{name}(clip='two_pass')" if name in CLIPPED else name
    return "+".join([spec, *PARTNERS.get(name, [])])


def strategies_of(stack: str) -> list[Strategy]:
    """Parsed."""
    return registry.parse_all(stack_of(stack))


def plan_for(model: Model, stack: str) -> Plan:
    """The plan of what `workload` trains."""
    return plan(
        llama_config(model.size),
        strategies_of(stack),
        batch_size=model.shape.batch_size,
        sequence_length=model.shape.sequence_length,
        dtype=DTYPE,
        max_grad_norm=SETTINGS.max_grad_norm,
    )


def workload(model: Model, device: torch.device, *, steps: int) -> Workload:
    """`steps` optimizer steps over one window of random ids, on the device."""
    config = llama_config(model.size)
    window = [
        {name: value.to(device) for name, value in batch.items()}
        for batch in random_batches(config.vocab_size, model.shape)
    ]

    def build(strategies: Sequence[Strategy]) -> nn.Module:
        return memrt.load(config, strategies, dtype=DTYPE, device=device, seed=0)

    description: dict[str, Any] = {
        "model": f"Llama {model.size}",
        "dtype": str(DTYPE).removeprefix("torch."),
        "batch_size": model.shape.batch_size,
        "sequence_length": model.shape.sequence_length,
    }
    return Workload(
        build=build,
        windows=[window] * steps,
        settings=SETTINGS,
        device=device,
        description=description,
    )
