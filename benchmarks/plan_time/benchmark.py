"""How long a plan takes.

Claim: `memrt.plan` tells the memory of a 70B training run in seconds, on two cores, without weights
and without a GPU.

How it is measured: `memrt.plan` of Llama shapes from 0.1B to 70B, bf16, one sequence of 2048 ids,
under `activation_checkpoint`; the time is what the plan itself says it took, from config to peak.
Imports come before (a first, tiny plan loads what is loaded late), so they are not in it. Processor
time is kept beside it: where it is much less, the machine was busy with something else. `--full`
runs every layer instead of carrying three depths to the full one. The two must agree to the byte.

Goal: 3 seconds for 70B.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.record import spread
from benchmarks.shapes import llama_config
from memrt.planning import Plan, plan

__all__ = ["CLAIM", "DEFAULTS", "GOAL", "TINY", "run"]

CLAIM = "memrt.plan predicts the memory of a 70B training run in seconds, on two CPU cores."
MOST_SECONDS = 3.0
GOAL = f"at most {MOST_SECONDS:g} seconds for the largest model"

DEFAULTS: dict[str, Any] = {
    "sizes": ["0.1B", "1B", "8B", "13B", "70B"],
    "strategies": ["activation_checkpoint"],
    "sequence_length": 2048,
    "repetitions": 5,
    "full_repetitions": 1,
}
TINY: dict[str, Any] = {
    "sizes": ["tiny", "0.01B"],
    "sequence_length": 16,
    "repetitions": 1,
}


def _plan(size: str, options: Mapping[str, Any], *, full: bool) -> Plan:
    return plan(
        llama_config(size),
        options["strategies"],
        sequence_length=options["sequence_length"],
        dtype=torch.bfloat16,
        full=full,
    )


def _repetition(size: str, options: Mapping[str, Any], *, full: bool) -> dict[str, Any]:
    began = time.process_time()
    found = _plan(size, options, full=full)
    return {
        "size": size,
        "full": full,
        "seconds": found.seconds,
        "processor_seconds": time.process_time() - began,
        "num_layers": found.num_layers,
        "simulated_layers": list(found.simulated_layers),
        "peak_bytes": found.peak_bytes,
        "rounded_peak_bytes": found.simulation.rounded_peak_bytes,
        "accounts": found.simulation.peak.accounts,
    }


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes in turn, so that a slow moment of the machine does not hit one size alone."""
    _plan("tiny", {**options, "sequence_length": 8}, full=False)
    repetitions = [
        _repetition(size, options, full=False)
        for _ in range(options["repetitions"])
        for size in options["sizes"]
    ]
    repetitions += [
        _repetition(size, options, full=True)
        for _ in range(options["full_repetitions"])
        for size in options["sizes"]
    ]
    summary = {size: _summary(size, repetitions) for size in options["sizes"]}
    largest = options["sizes"][-1]
    seconds = summary[largest]["seconds"]
    unequal = [size for size, each in summary.items() if each["full_plan_is_equal"] is False]
    return {
        "repetitions": repetitions,
        "summary": summary,
        "met": seconds["median"] <= MOST_SECONDS and not unequal,
        "reason": f"{largest}: {seconds['median']:.2f} s (fastest {seconds['min']:.2f}, slowest "
        f"{seconds['max']:.2f} of {seconds['count']})"
        + (f"; the full plan differs for {', '.join(unequal)}" if unequal else ""),
    }


def _summary(size: str, repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    quick = [each for each in repetitions if each["size"] == size and not each["full"]]
    full = [each for each in repetitions if each["size"] == size and each["full"]]
    memory = ("peak_bytes", "rounded_peak_bytes", "accounts")
    return {
        "num_layers": quick[0]["num_layers"],
        "seconds": spread([each["seconds"] for each in quick]),
        "processor_seconds": spread([each["processor_seconds"] for each in quick]),
        "full_seconds": spread([each["seconds"] for each in full]) if full else None,
        "peak_bytes": quick[0]["peak_bytes"],
        "rounded_peak_bytes": quick[0]["rounded_peak_bytes"],
        "full_plan_is_equal": all(each[key] == quick[0][key] for each in full for key in memory)
        if full
        else None,
    }
