"""What a training step with GaLore costs, its refreshes included.

Claim: where a model is as wide as those that GaLore is for, a whole step with `galore` on a
sequence of the paper's 256 tokens takes at most half of one with the authors' galore-torch at the
same rank and interval, for the gradient is not formed and no SVD is taken.

How it is measured: a Llama of random weights trains on the same random ids with torch's fused
AdamW, with galore-torch's GaLoreAdamW and with `galore` in both forms, in one process, taking turns
step by step; which one goes first rotates. galore-torch refreshes every weight in the same step,
`galore` spreads refreshes over the steps; so that both are charged the same way, the interval is
set so long that only the first step refreshes, and it refreshes everything. For an interval of T
steps,

    amortised = later step + (first step - later step) / T

with the median over the later steps (`warm_up` of them left out). What a first step costs beside
refreshes (state that is made) is charged to everybody. A whole step is forward, backward and
update; the update is the optimizer's step alone, of which memrt's does less, for the projection is
part of its backward. On the CPU time is the processor's, with torch on one thread, so that what
else the machine does is not in it; on a GPU it is wall time, the device waited for.

Goal: the amortised whole step is at most 0.5 × that of galore-torch for a layer of 8B's shape and
one sequence of 256 tokens, the length of the paper's, at rank 128 and at the paper's rank for 7B,
1024. More tokens and narrower models are shown. There the SVDs, whose cost grows with the cube of
the width and not with the tokens, matter less, and multiplications alone set a bound: forward and
dX are in both; beside them galore-torch has dW, its projection and the lift of the update, `galore`
a projection that is small and the lift, so that without SVDs the ratio is at least
(2 t + r) / (3 t + 2 r) for t tokens and rank r.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import memrt
from benchmarks.record import spread
from benchmarks.step_times import (
    Step,
    case_ids,
    case_model,
    case_name,
    in_turns,
    loss_of,
    one_thread,
    session_step,
    timed,
)

__all__ = [
    "CLAIM",
    "DEFAULTS",
    "GOAL",
    "NEVER",
    "TINY",
    "authors_optimizer",
    "measure",
    "run",
    "summarise",
]

CLAIM = (
    "On one sequence of 256 tokens a step with galore, refreshes included, takes at most half of "
    "one with galore-torch."
)
GOAL = (
    "amortised whole step at most 0.5 × galore-torch's for a layer of 8B's shape and 256 tokens "
    "(the paper's sequence)"
)
LARGEST_RATIO = 0.5
JUDGED = {"size": "8B", "tokens": 256}
"""What a case that is judged has, of every rank."""

BASE, PEER, OURS = "torch fused AdamW", "galore-torch", "memrt galore"
OURS_FORMED = "memrt galore, gradient formed"
NEVER = 10**9
"""An interval within which nothing but the first step refreshes."""

DEFAULTS: dict[str, Any] = {
    "cases": [
        {"size": "0.03B", "tokens": 128},
        {"size": "0.03B", "tokens": 512},
        {**JUDGED, "layers": 1, "vocabulary": 1024},
        {**JUDGED, "layers": 1, "vocabulary": 1024, "rank": 1024},
        {"size": "8B", "layers": 1, "vocabulary": 1024, "tokens": 512},
    ],
    "sequence_length": 256,
    "rank": 128,
    "every": 200,
    "steps": 6,
    "warm_up": 1,
}
TINY: dict[str, Any] = {
    "cases": [{"size": "tiny", "tokens": 32}],
    "sequence_length": 16,
    "rank": 8,
    "steps": 2,
}
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda ids: timed(ids.device, lambda: loss_of(model, ids).backward(), update)  # type: ignore[no-untyped-call]


def _ours(model: nn.Module, form: str, *, every: int, rank: int) -> Step:
    strategy = {"galore": {"form": form, "rank": rank, "every": every}}
    return session_step(memrt.prepare(model, [strategy], **ADAMW))


def authors_optimizer(
    model: nn.Module, *, every: int, rank: int, settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """galore-torch's AdamW over a model, its layers' linear weights projected as in the paper."""
    from galore_torch import GaLoreAdamW

    projected = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    chosen = {id(parameter) for parameter in projected}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    low_rank = {"rank": rank, "update_proj_gap": every, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": rest}, {"params": projected, **low_rank}]
    made: torch.optim.Optimizer = GaLoreAdamW(groups, no_deprecation_warning=True, **settings)
    return made


def _step(
    label: str, case: Mapping[str, Any], rank: int, device: torch.device, dtype: torch.dtype
) -> Step:
    model = case_model(case, device, dtype)
    if label == BASE:
        return _plain(model, torch.optim.AdamW(model.parameters(), fused=True, **ADAMW))
    if label == PEER:
        return _plain(model, authors_optimizer(model, every=NEVER, rank=rank, settings=ADAMW))
    form = "gradient_free" if label == OURS else "plain"
    return _ours(model, form, every=NEVER, rank=rank)


def measure(
    options: Mapping[str, Any],
    case: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Seconds of the first step, which refreshes, and of the later ones, for every variant.

    A case may have a rank of its own; `left_out` names variants that do not run.
    """
    rank = case.get("rank", options["rank"])
    ids = case_ids(case, options["sequence_length"], device)
    peers = [PEER] if find_spec("galore_torch") else []
    left_out = options.get("left_out", ())
    labels = [label for label in (OURS, *peers, OURS_FORMED, BASE) if label not in left_out]
    steps = {label: _step(label, case, rank, device, dtype) for label in labels}
    first = {label: step(ids) for label, step in steps.items()}
    later = in_turns(steps, ids, warm_up=options["warm_up"], count=options["steps"])
    return {
        "case": dict(case),
        "variants": {
            label: {
                "first_seconds": {"whole": first[label][0], "update": first[label][1]},
                "later_seconds": {"whole": later[label].whole, "update": later[label].update},
            }
            for label in labels
        },
    }


def summarise(found: Mapping[str, Any], every: int) -> dict[str, Any]:
    """Amortised times of every variant, and how many of galore-torch's its whole step takes."""

    def amortised(label: str, kind: str) -> float:
        times = found["variants"][label]
        later = float(spread(times["later_seconds"][kind])["median"])
        if label == BASE:  # refreshes nothing
            return later
        return later + (float(times["first_seconds"][kind]) - later) / every

    peer = amortised(PEER, "whole") if PEER in found["variants"] else None
    return {
        label: {
            "amortised_whole_seconds": amortised(label, "whole"),
            "amortised_update_seconds": amortised(label, "update"),
            "ratio_to_galore_torch": None if peer is None else amortised(label, "whole") / peer,
            "later_whole_seconds": spread(times["later_seconds"]["whole"]),
            "first_whole_seconds": times["first_seconds"]["whole"],
        }
        for label, times in found["variants"].items()
    }


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every case in turn, on the CPU; the GPU suite calls `measure` on its device."""
    if not find_spec("galore_torch"):
        raise ImportError("the authors' optimizer is compared with; run: pip install galore-torch")
    with one_thread():
        repetitions = [measure(options, case, torch.device("cpu")) for case in options["cases"]]
    summary = {
        case_name(found["case"]): summarise(found, options["every"]) for found in repetitions
    }
    judged = [
        summary[case_name(case)][OURS]["ratio_to_galore_torch"]
        for case in options["cases"]
        if JUDGED.items() <= case.items()
    ]
    return {
        "repetitions": repetitions,
        "summary": summary,
        "met": max(judged) <= LARGEST_RATIO if judged else None,
        "reason": "; ".join(_sentence(name, rows) for name, rows in summary.items()),
    }


def _sentence(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    ours, peer, base = (rows[label]["amortised_whole_seconds"] for label in (OURS, PEER, BASE))
    return (
        f"{name}: {ours:.2f} s, galore-torch {peer:.2f} s ({ours / peer:.2f} ×), torch's fused "
        f"AdamW {base:.2f} s"
    )
