"""What a step of AdamW costs with its moments in fewer bits.

Claim: with FP8 moments a step takes no longer than bitsandbytes' 8-bit step on the same parameters,
and state falls from 8 to about 2 bytes a parameter.

How it is measured: torch's fused AdamW, bitsandbytes' AdamW8bit and memrt's AdamW in every state
format, each with parameters and gradients of its own and of the same sizes, take turns step by step
in one process, and which one goes first rotates. Steps before that create state and compile; they
are not counted. The ratio of a round is the time of a step over that of torch's fused AdamW in the
same round. State bytes are those of the tensors that the optimizer holds afterwards.

Goal: the median FP8 step is at most that of bitsandbytes, in the parameters' dtype.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.record import spread
from memrt.optimizers.adamw import AdamW
from memrt.optimizers.state_formats import STATE_FORMATS

__all__ = ["CLAIM", "DEFAULTS", "GOAL", "TINY", "measure", "run"]

CLAIM = "An AdamW step on FP8 moments takes no longer than bitsandbytes' on 8-bit ones."
GOAL = "the median FP8 step takes at most the time of bitsandbytes' 8-bit step"
BASE, PEER, OURS = "torch fused", "bitsandbytes 8-bit", "memrt fp8"

DEFAULTS: dict[str, Any] = {
    "num_parameters": 16,
    "elements": 2**20,
    "dtypes": ["float32", "bfloat16"],
    "steps": 12,
    "warm_up": 3,
}
TINY: dict[str, Any] = {"num_parameters": 2, "elements": 2**12, "steps": 3, "warm_up": 1}
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def _parameters(
    num_parameters: int, elements: int, dtype: torch.dtype, device: torch.device
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(num_parameters):
        values = torch.randn(2, elements, generator=generator).to(device, dtype)
        parameter = nn.Parameter(values[0].clone())
        parameter.grad = values[1].clone()
        made.append(parameter)
    return made


def _optimizers(
    options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.optim.Optimizer]:
    from bitsandbytes.optim import AdamW8bit

    def fresh() -> list[nn.Parameter]:
        return _parameters(options["num_parameters"], options["elements"], dtype, device)

    found: dict[str, torch.optim.Optimizer] = {
        BASE: torch.optim.AdamW(fresh(), fused=True, **ADAMW),
        PEER: AdamW8bit(fresh(), **ADAMW),
    }
    for name in STATE_FORMATS:
        found[f"memrt {name}"] = AdamW(fresh(), state_format=name, **ADAMW)
    return found


def _seconds(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    begun = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def measure(options: Mapping[str, Any], dtype: str, device: torch.device) -> dict[str, Any]:
    """The seconds of every counted step of every optimizer, and its state's bytes."""
    optimizers = _optimizers(options, getattr(torch, dtype), device)
    for _ in range(options["warm_up"]):
        for optimizer in optimizers.values():
            _seconds(optimizer, device)
    labels = list(optimizers)
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    for step in range(options["steps"]):
        turn = step % len(labels)
        for label in labels[turn:] + labels[:turn]:
            seconds[label].append(_seconds(optimizers[label], device))
    return {
        "dtype": dtype,
        "num_elements": options["num_parameters"] * options["elements"],
        "step_seconds": seconds,
        "state_bytes": {label: _state_bytes(each) for label, each in optimizers.items()},
    }


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    n, seconds = found["num_elements"], found["step_seconds"]

    def ratio(label: str) -> dict[str, float]:
        rounds = zip(seconds[label], seconds[BASE], strict=True)
        return spread([own / base for own, base in rounds])

    return {
        label: {
            "nanoseconds_per_parameter": spread([1e9 * each / n for each in seconds[label]]),
            "ratio_to_torch_fused": ratio(label),
            "state_bytes_per_parameter": found["state_bytes"][label] / n,
        }
        for label in seconds
    }


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every dtype in turn, on the CPU; the GPU suite calls `measure` on its device."""
    repetitions = [measure(options, dtype, torch.device("cpu")) for dtype in options["dtypes"]]
    summary = {found["dtype"]: _summary(found) for found in repetitions}
    return {
        "repetitions": repetitions,
        "summary": summary,
        "met": all(_median(each, OURS) <= _median(each, PEER) for each in summary.values()),
        "reason": _reason(summary, (OURS, PEER, BASE)),
    }


def _median(summary: Mapping[str, Any], label: str) -> float:
    value: float = summary[label]["nanoseconds_per_parameter"]["median"]
    return value


def _reason(summary: Mapping[str, Any], labels: Sequence[str]) -> str:
    return "; ".join(
        f"{dtype}: "
        + ", ".join(f"{label} {_median(each, label):.2f} ns a parameter" for label in labels)
        for dtype, each in summary.items()
    )
