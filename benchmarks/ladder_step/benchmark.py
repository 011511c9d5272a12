"""What a ladder saves and costs beside LoRA with activation checkpointing.

Claim: with the same head and loss, a pooled, checkpointed ladder of 1/16 of the width keeps at most
0.3 of the activations that LoRA with activation checkpointing keeps, in at most half of its time.

How it is measured: a Llama of random weights, frozen, trains on the same random ids with each
stack, in one process, taking turns step by step; which one goes first rotates. Time is the
processor's on one thread: whole steps of forward, backward and update. Activations and peak are
those of the plan, which is equal to the ledger to the byte (`tests/contract.py` holds that for
every strategy and family). Every stack has the fused loss, so that logits are in none.

Goal: activations at most 0.3 ×, the median whole step at most 0.5 × those of LoRA with
checkpointing, for the checkpointed ladder with pooled taps, and with projected ones, which keep
nothing either and lose less on SST-2 (`benchmarks.quality.sst2`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import memrt
from benchmarks.record import spread
from benchmarks.step_times import (
    Step,
    case_config,
    case_ids,
    case_model,
    case_name,
    in_turns,
    one_thread,
    session_step,
)

__all__ = ["CLAIM", "DEFAULTS", "GOAL", "STACKS", "TINY", "measure", "run", "summarise"]

CLAIM = "A narrow ladder keeps a third of what checkpointed LoRA keeps, in half of its time."
GOAL = "activations at most 0.3 ×, step at most 0.5 × those of LoRA with activation checkpointing"
LARGEST_SHARE, LARGEST_RATIO = 0.3, 0.5

BASE = "lora + checkpointing"
OURS, PROJECTED = "ladder, pooled, checkpointed", "ladder, projected, checkpointed"
JUDGED = (OURS, PROJECTED)
STACKS: dict[str, list[str]] = {
    BASE: ["peft(rank=16)", "activation_checkpoint", "fused_loss"],
    "lora": ["peft(rank=16)", "fused_loss"],
    "lora, fused": ["peft(rank=16)", "fused_lora", "fused_loss"],
    OURS: ["ladder(reduction=16, taps='pooled', checkpoint=True)", "fused_loss"],
    # from random directions, which cost what those of a probe set do
    PROJECTED: [
        "ladder(reduction=16, taps='projected', init='random', checkpoint=True)",
        "fused_loss",
    ],
    "ladder, pooled": ["ladder(reduction=16, taps='pooled')", "fused_loss"],
    "ladder, linear taps": ["ladder(reduction=16)", "fused_loss"],
}

DEFAULTS: dict[str, Any] = {
    "cases": [
        {"size": "0.1B", "tokens": 512},
        {"size": "1B", "layers": 4, "vocabulary": 4096, "tokens": 512},
    ],
    "sequence_length": 512,
    "steps": 6,
    "warm_up": 1,
}
TINY: dict[str, Any] = {
    "cases": [{"size": "0.004B", "tokens": 32}],
    "sequence_length": 32,
    "steps": 2,
}


def _step(stack: list[str], case: Mapping[str, Any], device: torch.device) -> Step:
    model = case_model(case, device, torch.float32)
    return session_step(memrt.prepare(model, stack, lr=1e-4))


def _bytes(stack: list[str], case: Mapping[str, Any], sequence_length: int) -> dict[str, int]:
    """Activations and peak of the plan of the same run."""
    planned = memrt.plan(
        case_config(case),
        stack,
        batch_size=case["tokens"] // sequence_length,
        sequence_length=sequence_length,
        max_grad_norm=0.0,
    )
    return {
        "activation_bytes": planned.simulation.account_maxima["activations"],
        "peak_bytes": planned.peak_bytes,
    }


def measure(
    options: Mapping[str, Any], case: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Seconds of every counted step of every stack, and what its plan says of bytes."""
    length = options["sequence_length"]
    ids = case_ids(case, length, device)
    steps = {label: _step(stack, case, device) for label, stack in STACKS.items()}
    times = in_turns(steps, ids, warm_up=options["warm_up"], count=options["steps"])
    return {
        "case": dict(case),
        "stacks": {
            label: {
                "strategies": stack,
                "whole_seconds": times[label].whole,
                **_bytes(stack, case, length),
            }
            for label, stack in STACKS.items()
        },
    }


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """Every stack beside LoRA with checkpointing."""
    base = found["stacks"][BASE]

    def ratios(stack: Mapping[str, Any]) -> list[float]:
        rounds = zip(stack["whole_seconds"], base["whole_seconds"], strict=True)
        return [own / other for own, other in rounds]

    return {
        label: {
            "activation_bytes": stack["activation_bytes"],
            "peak_bytes": stack["peak_bytes"],
            "share_of_activations": stack["activation_bytes"] / base["activation_bytes"],
            "whole_seconds": spread(stack["whole_seconds"]),
            "ratio_of_steps": spread(ratios(stack)),
        }
        for label, stack in found["stacks"].items()
    }


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every case in turn, on the CPU."""
    with one_thread():
        repetitions = [measure(options, case, torch.device("cpu")) for case in options["cases"]]
    summary = {case_name(found["case"]): summarise(found) for found in repetitions}
    met = all(
        rows[label]["share_of_activations"] <= LARGEST_SHARE
        and rows[label]["ratio_of_steps"]["median"] <= LARGEST_RATIO
        for rows in summary.values()
        for label in JUDGED
    )
    return {
        "repetitions": repetitions,
        "summary": summary,
        "met": met,
        "reason": "; ".join(_sentence(name, rows) for name, rows in summary.items()),
    }


def _sentence(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    found = [
        f"{label} {rows[label]['share_of_activations']:.2f} × the activations, "
        f"{rows[label]['ratio_of_steps']['median']:.2f} × the step"
        for label in JUDGED
    ]
    return f"{name}, beside {BASE}: {', '.join(found)}"
