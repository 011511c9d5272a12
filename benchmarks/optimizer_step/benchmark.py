"""What a step of AdamW costs with its moments in fewer bits.

Claim: with FP8 moments and dynamic range expansion a step takes no longer than bitsandbytes' 8-bit
step on the same parameters, and at most 2.5 times torchao's on plain FP8 moments, which expands
nothing; state falls from 8 to about 2 bytes a parameter.

How it is measured: torch's fused AdamW, bitsandbytes' AdamW8bit, torchao's AdamWFp8 and memrt's
AdamW in every state format, each with parameters and gradients of its own and of the same sizes,
take turns step by step in one process, and which one goes first rotates. Steps before that create
state and compile; they are not counted. The ratio of a round is the time of a step over that of
torch's fused AdamW in the same round. State bytes are those of the tensors that the optimizer holds
afterwards. A peer that is not installed is left out, and its part of the goal is not judged
(bitsandbytes comes with memrt, torchao with memrt[peers]).

What that is of a whole step is measured too, and not judged: forward, backward and update of a
Llama of random weights on the same ids (`whole_steps.py`), in processor time with torch on one
thread, beside torchao's 8-bit and 4-bit AdamW as well, and GaLore, galore-torch's and memrt's, with
its refreshes. The fewer the tokens of a step, the more the update weighs.

Goal: the median FP8 step is at most that of bitsandbytes and 2.5 × torchao's, in either dtype.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.optimizer_step import whole_steps
from benchmarks.optimizer_step.whole_steps import ADAMW, BASE, state_bytes
from benchmarks.record import spread
from benchmarks.step_times import one_thread
from memrt.optimizers.adamw import AdamW
from memrt.optimizers.state_formats import STATE_FORMATS

__all__ = ["CLAIM", "DEFAULTS", "GOAL", "TINY", "measure", "run"]

CLAIM = "An AdamW step on FP8 moments takes no longer than bitsandbytes' on 8-bit ones."
GOAL = "median FP8 step at most bitsandbytes' 8-bit step and 2.5 × torchao's on plain FP8"
OURS = "memrt fp8"
LIMITS = {"bitsandbytes 8-bit": 1.0, "torchao fp8": 2.5}
"""How many steps of a peer a step of ours may take."""

DEFAULTS: dict[str, Any] = {
    "num_parameters": 16,
    "elements": 2**20,
    "dtypes": ["float32", "bfloat16"],
    "steps": 12,
    "warm_up": 3,
    "cases": [{"size": "0.03B", "tokens": 128}, {"size": "0.03B", "tokens": 512}],
    "sequence_length": 256,
    "whole_steps": 8,
    "rank": 128,
    "every": 200,
}
TINY: dict[str, Any] = {
    "num_parameters": 2,
    "elements": 2**12,
    "steps": 3,
    "warm_up": 1,
    "cases": [{"size": "tiny", "layers": 1, "tokens": 16}],
    "sequence_length": 16,
    "whole_steps": 2,
    "rank": 8,
}


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
    def fresh() -> list[nn.Parameter]:
        return _parameters(options["num_parameters"], options["elements"], dtype, device)

    found: dict[str, torch.optim.Optimizer] = {
        BASE: torch.optim.AdamW(fresh(), fused=True, **ADAMW),
    }
    formats = list(STATE_FORMATS)
    if find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit

        found["bitsandbytes 8-bit"] = AdamW8bit(fresh(), **ADAMW)
    else:
        formats.remove("int8")  # computed by bitsandbytes too
    if find_spec("torchao"):
        from torchao.optim import AdamWFp8

        found["torchao fp8"] = AdamWFp8(fresh(), **ADAMW)
    for name in formats:
        found[f"memrt {name}"] = AdamW(fresh(), state_format=name, **ADAMW)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao compiles in its first step, and torch warns of deprecations of its own there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _seconds(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    begun = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def measure(options: Mapping[str, Any], dtype: str, device: torch.device) -> dict[str, Any]:
    """The seconds of every counted step of every optimizer, and its state's bytes."""
    with _quiet():
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
        "state_bytes": {label: state_bytes(each) for label, each in optimizers.items()},
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


def _whole(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    cpu = torch.device("cpu")
    with one_thread(), _quiet():
        return [
            whole_steps.measure(options, case, dtype, cpu)
            for case in options["cases"]
            for dtype in options["dtypes"]
        ]


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every dtype in turn, on the CPU; the GPU suite calls `measure` on its device."""
    updates = [measure(options, dtype, torch.device("cpu")) for dtype in options["dtypes"]]
    whole = _whole(options)
    summary = {found["dtype"]: _summary(found) for found in updates}
    named = {whole_steps.name_of(found): whole_steps.summarise(found) for found in whole}
    return {
        "repetitions": [*updates, *whole],
        "summary": {"updates": summary, "whole steps": named},
        "met": _met(summary),
        "reason": _reason(summary, (OURS, *LIMITS, BASE)),
    }


def _median(summary: Mapping[str, Any], label: str) -> float:
    value: float = summary[label]["nanoseconds_per_parameter"]["median"]
    return value


def _met(summary: Mapping[str, Any]) -> bool | None:
    """None where a peer is missing and the others' limits hold."""
    within = [
        _median(each, OURS) <= limit * _median(each, peer)
        for each in summary.values()
        for peer, limit in LIMITS.items()
        if peer in each
    ]
    if not all(within):
        return False
    return True if len(within) == len(LIMITS) * len(summary) else None


def _reason(summary: Mapping[str, Any], labels: Sequence[str]) -> str:
    def of(each: Mapping[str, Any]) -> str:
        found = [label for label in labels if label in each]
        return ", ".join(f"{label} {_median(each, label):.2f} ns a parameter" for label in found)

    return "; ".join(f"{dtype}: {of(each)}" for dtype, each in summary.items())
