"""Whole training steps (forward, backward, update) of one Llama under every optimizer.

What the update costs beside the rest: torch's fused AdamW, bitsandbytes' and torchao's in 8 bits,
FP8 and 4 bits, memrt's state formats, and GaLore, the authors' and memrt's, each on a model of its
own with the same weights. Every one is driven by the same session and takes turns with the others,
step by step, on the same ids; which one goes first rotates. On the CPU time is the processor's and
torch has one thread. With GaLore only a first step refreshes; what it takes beside a later one is
spread over the steps of an interval, as in `benchmarks.galore_step`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import memrt
from benchmarks.galore_step.benchmark import NEVER, authors_optimizer
from benchmarks.record import spread
from benchmarks.step_times import Step, case_ids, case_model, case_name, in_turns, session_step

__all__ = ["ADAMW", "BASE", "markdown", "measure", "name_of", "state_bytes", "summarise"]

BASE = "torch fused"
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
FORMATS = {"memrt int8": "int8_states", "memrt fp8": "fp8_states", "memrt int4": "int4_states"}
"""Label -> strategy; the first is computed by bitsandbytes."""
GALORE = ("galore-torch", "memrt galore")
"""The authors' and ours; their first step refreshes."""

Make = Callable[[Any], torch.optim.Optimizer]


def _peers() -> dict[str, Make]:
    """Optimizers of others that are installed."""
    made: dict[str, Make] = {BASE: lambda ps: torch.optim.AdamW(ps, fused=True, **ADAMW)}
    if find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit

        made["bitsandbytes 8-bit"] = lambda ps: AdamW8bit(ps, **ADAMW)
    if find_spec("torchao"):
        from torchao import optim

        made["torchao 8-bit"] = lambda ps: optim.AdamW8bit(ps, **ADAMW)
        made["torchao fp8"] = lambda ps: optim.AdamWFp8(ps, **ADAMW)
        made["torchao 4-bit"] = lambda ps: optim.AdamW4bit(ps, **ADAMW)
    return made


def _sessions(
    options: Mapping[str, Any], case: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, memrt.Session]:
    def model() -> nn.Module:
        return case_model(case, device, dtype)

    found = {}
    for label, make in _peers().items():
        own = model()
        found[label] = memrt.prepare(own, [], optimizer=make(own.parameters()))
    for label, strategy in FORMATS.items():
        if strategy != "int8_states" or find_spec("bitsandbytes"):
            found[label] = memrt.prepare(model(), [strategy], **ADAMW)
    interval = {"every": NEVER, "rank": options["rank"]}
    authors, ours = GALORE
    if find_spec("galore_torch"):
        own = model()
        optimizer = authors_optimizer(own, **interval, settings=ADAMW)
        found[authors] = memrt.prepare(own, [], optimizer=optimizer)
    found[ours] = memrt.prepare(model(), [{"galore": interval}], **ADAMW)
    return found


def measure(
    options: Mapping[str, Any], case: Mapping[str, Any], dtype: str, device: torch.device
) -> dict[str, Any]:
    """Seconds of every counted step and of its update, and the bytes of the state."""
    sessions = _sessions(options, case, device, getattr(torch, dtype))
    steps: dict[str, Step] = {label: session_step(each) for label, each in sessions.items()}
    ids = case_ids(case, options["sequence_length"], device)
    first = {label: steps[label](ids) for label in GALORE if label in steps}
    times = in_turns(steps, ids, warm_up=options["warm_up"], count=options["whole_steps"])
    model = next(iter(sessions.values())).model
    return {
        "case": dict(case),
        "dtype": dtype,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "every": options["every"],
        "variants": {
            label: {
                "whole_seconds": times[label].whole,
                "update_seconds": times[label].update,
                "first_seconds": first.get(label),
                "state_bytes": state_bytes(session.optimizer) + _basis_bytes(session),
            }
            for label, session in sessions.items()
        },
    }


def state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Of every tensor in its state."""
    assert optimizer is not None
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(_bytes(value) for value in values if isinstance(value, torch.Tensor))


def _basis_bytes(session: memrt.Session) -> int:
    """Of GaLore's bases: those of a strategy, and those in the projectors of galore-torch."""
    assert session.optimizer is not None
    states = session.optimizer.state.values()
    theirs = [state["projector"].ortho_matrix for state in states if "projector" in state]
    ours = [
        tensor
        for attachment in session.attachments
        for subspace in getattr(attachment, "subspaces", {}).values()
        for tensor in subspace.tensors().values()
    ]
    return sum(map(_bytes, [*theirs, *ours]))


def _bytes(tensor: torch.Tensor) -> int:
    """Of what it holds: a subclass of torchao's says that it is an fp32 tensor."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def name_of(found: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    return f"{case_name(found['case'])}, {found['dtype']}"


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of every variant; the ratio is to torch's fused AdamW in the same round."""
    variants, base = found["variants"], found["variants"][BASE]["whole_seconds"]

    def row(each: Mapping[str, Any]) -> dict[str, Any]:
        whole, update = _with_refreshes(each, found.get("every", 1))
        ratios = [own / other for own, other in zip(whole, base, strict=True)]
        return {
            "whole_seconds": spread(whole),
            "update_seconds": spread(update),
            "ratio_to_torch_fused": spread(ratios),
            "state_bytes_per_parameter": each["state_bytes"] / found["num_parameters"],
        }

    return {label: row(each) for label, each in variants.items()}


def _with_refreshes(each: Mapping[str, Any], every: int) -> tuple[list[float], list[float]]:
    """Whole steps and updates, each with its share of what a first step took beside a later one."""
    times = (each["whole_seconds"], each["update_seconds"])
    firsts = each.get("first_seconds") or [statistics.median(seconds) for seconds in times]
    whole, update = (
        [own + (first - statistics.median(seconds)) / every for own in seconds]
        for first, seconds in zip(firsts, times, strict=True)
    )
    return whole, update


def markdown(record: Mapping[str, Any]) -> str:
    """A table for every case and dtype of a record, for benchmarks/README.md."""
    summary: Mapping[str, Any] = record["summary"].get("whole steps", {})
    where = record["conditions"]
    when = f"{where['cpu']}, {where['date'][:10]}, {where['commit']}"
    if not summary:
        return f"{when}: updates alone, from before whole steps were timed."
    return "\n\n".join(_table(f"**{name}** ({when})", rows) for name, rows in summary.items())


def _table(title: str, rows: Mapping[str, Any]) -> str:
    head = (
        "optimizer",
        "whole step, ms",
        "of torch fused",
        "update, ms",
        "state bytes a parameter",
    )
    cells = [
        (
            label,
            f"{1e3 * row['whole_seconds']['median']:.1f}",
            f"{row['ratio_to_torch_fused']['median']:.2f} ×",
            f"{1e3 * row['update_seconds']['median']:.1f}",
            f"{row['state_bytes_per_parameter']:.2f}",
        )
        for label, row in rows.items()
    ]
    lines = [head, ("---",) * len(head), *cells]
    return "\n".join([title, "", *("| " + " | ".join(each) + " |" for each in lines)])
