"""Reports of every kind as JSON, with numbers that are easy to find again."""

from __future__ import annotations

from typing import Any

from memrt.profiling.accounts import Account

MIB = 2**20
NASTY = "</td><script>alert(1)</script>\"' onload=x & \u202e\x00ü|\udc80"
"""A name that would break a page that trusts it."""


def accounts(scale: int = MIB) -> dict[str, int]:
    return {account.value: (i + 1) * scale for i, account in enumerate(Account)}


def memory(scale: int = MIB) -> dict[str, Any]:
    held = accounts(scale)
    peak = sum(held.values())
    return {
        "peak_bytes": peak,
        "accounts": held,
        "account_maxima": {name: 2 * value for name, value in held.items()},
        "places": {"device": peak, "host": 0, "disk": 0},
        "place_peaks": {"device": peak, "host": 0, "disk": 0},
        "owners": {"model": peak - scale, NASTY: scale},
        "phases": {"load": scale, "forward": 2 * scale, "backward": peak, "step": scale},
        "region": {"step": 1, "phase": "backward", "module": NASTY},
        "top_allocations": [
            {
                "bytes": scale,
                "account": "weights",
                "owner": "model",
                "module": NASTY,
                "operator": "aten.mm",
            }
        ],
        "rounded_peak_bytes": peak,
        "device_bytes": {"low": peak, "expected": 2 * peak, "high": 3 * peak},
        "overheads": [],
        "gpu": {"text": "24GiB", "total_bytes": 24 * 2**30},
        "fits": True,
    }


def timeline() -> list[dict[str, Any]]:
    """A ramp with its peak in backward of the second step."""
    phases = [(-1, "load"), (0, "forward"), (0, "backward"), (0, "step"), (1, "backward")]
    samples = []
    for index, (step, phase) in enumerate(phases * 3):
        held = {name: value * (index % 5 + 1) // 5 for name, value in accounts().items()}
        samples.append(
            {
                "instant": index,
                "bytes": sum(held.values()),
                "step": step,
                "phase": phase,
                "accounts": held,
            }
        )
    return sorted(samples, key=lambda sample: (sample["step"], sample["phase"]))


def conditions() -> dict[str, Any]:
    return {
        "device": "cpu",
        "model": NASTY,
        "num_parameters": 1_500_000,
        "dtype": "float32",
        "batch_size": 4,
        "sequence_length": 256,
        "accumulation_steps": 1,
        "steps": 8,
        "ledger_steps": 2,
        "warm_up_steps": 1,
        "loss_steps": 3,
        "packages": {"torch": "2.13"},
        "commit": "abc",
        "date": "2026-01-02T03:04:05Z",
        "strategies": ["lisa"],
    }


def _phase(rss: int) -> dict[str, Any]:
    return {
        "num_times": 1,
        "seconds": 1.0,
        "rss_peak_bytes": rss,
        "device_used_peak_bytes": None,
        "process_used_peak_bytes": None,
        "allocated_peak_bytes": None,
        "reserved_peak_bytes": None,
    }


def monitor(**values: Any) -> dict[str, Any]:
    return {
        "at_peak": None,
        "allocator": None,
        "baseline": {"rss_bytes": 800 * MIB},
        "rss_peak_bytes": 840 * MIB,
        "process_peak_bytes": None,
        "phases": {"forward": _phase(840 * MIB)},
        "unavailable": {"nvml": "no driver", "allocator": "no CUDA"},
        "energy_source": None,
        **values,
    }


def profile(**values: Any) -> dict[str, Any]:
    return {
        "schema": "memrt.report/1",
        **memory(),
        "kind": "profile",
        "stack": "lisa",
        "timeline": timeline(),
        "tokens_per_second": 12345.6,
        "step_seconds": [0.25, 0.5, 0.25],
        "loss": 7.25,
        "losses": [8.0, 7.75, float("nan"), 7.5, 7.25],
        "evaluation_loss": None,
        "conditions": conditions(),
        "predicted": memory(),
        "monitor": monitor(),
        "joules_per_token": None,
        "kernel_scratch": None,
        **values,
    }


def plan() -> dict[str, Any]:
    return {
        "schema": "memrt.report/1",
        **memory(),
        "kind": "plan",
        "stack": "lisa",
        "tokens_per_second": None,
        "loss": None,
        "num_layers": 32,
        "simulated_layers": [4, 5, 6],
        "seconds": 1.5,
        "conditions": conditions(),
    }


def compare() -> dict[str, Any]:
    done = {
        **memory(),
        "status": "ok",
        "reason": None,
        "tokens_per_second": 100.0,
        "loss": 7.0,
        "losses": [8.0, 7.0],
        "evaluation_loss": 7.5,
    }
    refused = {"stack": NASTY, "status": "refused", "reason": NASTY}
    return {
        "schema": "memrt.report/1",
        "kind": "compare",
        "gpu": None,
        "conditions": conditions(),
        "runs": [
            {**done, "stack": "none"},
            {**done, **memory(MIB // 2), "stack": "lisa+int8_states", "tokens_per_second": 50.0},
            refused,
        ],
    }


def train() -> dict[str, Any]:
    return {
        **profile(),
        "kind": "train",
        "num_counted_steps": 3,
        "losses": [{"step": 5, "loss": 8.0}, {"step": 10, "loss": None}, {"step": 15, "loss": 7.0}],
        "evaluation_losses": [{"step": 15, "loss": 7.5}],
        "steps": 15,
        "resumed_from": None,
        "output": NASTY,
        "data": None,
        "predicted": {**memory(), "shape": [2, 64], "not_planned": []},
    }


KINDS = {"compare": compare, "plan": plan, "profile": profile, "train": train}
