"""What the SST-2 runs say: means over seeds, beside full AdamW and the linear probe.

Goals: every stack within 2 points of full AdamW and at least 4 above the probe, as means of 3
seeds. With fewer seeds nothing is judged. For ladders there is a second bound, 1.5 points,
which the verdict's reason tells of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality.sst2_stacks import BASELINE, STACKS
from memrt import registry
from memrt.compose import conflicts
from memrt.structure import Facts, RunSettings, discover

__all__ = ["CLAIM", "GOAL", "NAME", "outcome", "refusals"]

NAME = "sst2"
CLAIM = (
    "A real pretrained encoder fine-tuned on SST-2: what every stack's memory costs in accuracy."
)
GOAL = (
    "every stack at most 2 points below full AdamW and at least 4 above a linear probe on the "
    "frozen encoder (mean of 3 seeds)"
)
BELOW_ADAMW, ABOVE_PROBE = 0.02, 0.04
LADDER_BELOW_ADAMW = 0.015
NUM_SEEDS = 3


def refusals(encoder: Path) -> dict[str, str]:
    """Registered strategies that do not train this model alone, each with its reason."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(encoder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_config(config)
    facts = Facts(model=model, structure=discover(model), settings=RunSettings(max_grad_norm=0.0))
    found = {name: conflicts(registry.parse_all([name]), facts) for name in registry.names()}
    return {name: "; ".join(reasons) for name, reasons in found.items() if reasons}


def _stack_row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    return {
        "stack": name,
        "strategies": list(STACKS[name].strategies),
        "learning_rate": first["learning_rate"],
        "steps": first["steps"],
        "seeds": len(runs),
        "accuracy": fmean(run["accuracy"] for run in runs),
        "accuracies": [run["accuracy"] for run in runs],
        "loss": fmean(run["loss"] for run in runs),
        "seconds": fmean(run["seconds"] for run in runs),
        "processor_seconds": fmean(run["processor_seconds"] for run in runs),
        "cpus": sorted({run["cpu"] for run in runs}),
        "commits": sorted({run["commit"] for run in runs}),
        "peak_bytes": first["counted_peak_bytes"],
        "accounts": first["counted_accounts"],
        "account_maxima": first["counted_account_maxima"],
        "host_bytes": first["counted_place_peaks"]["host"],
    }


def _judged(row: dict[str, Any], baseline: float | None, probe: float) -> dict[str, Any]:
    below = None if baseline is None else baseline - row["accuracy"]
    above = row["accuracy"] - probe
    met = closer = None
    if row["seeds"] >= NUM_SEEDS and below is not None:
        met = below <= BELOW_ADAMW and above >= ABOVE_PROBE
        if any(strategy.startswith("ladder") for strategy in row["strategies"]):
            closer = below <= LADDER_BELOW_ADAMW
    return {**row, "below_adamw": below, "above_probe": above, "met": met, "within_1_5": closer}


def outcome(
    runs: Sequence[Mapping[str, Any]],
    probe: Mapping[str, float],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """Rows by stack, judged where there are seeds enough, and the verdict over all of them."""
    by_stack: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_stack.setdefault(run["stack"], []).append(run)
    rows = [_stack_row(name, found) for name, found in by_stack.items()]
    means = {row["stack"]: row["accuracy"] for row in rows}
    judged = [_judged(row, means.get(BASELINE), probe["accuracy"]) for row in rows]
    verdicts = [row["met"] for row in judged]
    return {
        "repetitions": list(runs),
        "summary": {"probe": dict(probe), "rows": judged, "refused": dict(refused)},
        "met": None if None in verdicts else all(verdicts),
        "reason": _reason(judged, probe["accuracy"]),
    }


def _reason(rows: Sequence[Mapping[str, Any]], probe: float) -> str:
    missed = [f"{row['stack']} {row['accuracy']:.3f}" for row in rows if row["met"] is False]
    lowest = min(rows, key=lambda row: row["accuracy"])
    full = next((row["accuracy"] for row in rows if row["stack"] == BASELINE), None)
    words = [  # names of stacks have commas
        f"probe {probe:.3f}",
        *([] if full is None else [f"full AdamW {full:.3f}"]),
        f"{len(rows)} stacks, the lowest {lowest['stack']} {lowest['accuracy']:.3f}",
    ]
    if missed:
        words.append("missed: " + " / ".join(missed))
    for answer, word in ((True, "within"), (False, "not within")):
        ladders = [row["stack"] for row in rows if row["within_1_5"] is answer]
        if ladders:
            words.append(f"{word} 1.5 points of AdamW: {' / '.join(ladders)}")
    return "; ".join(words)
