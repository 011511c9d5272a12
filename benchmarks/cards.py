"""Plans of every strategy and of a ladder of stacks, for the pages that help to choose.

    python -m benchmarks.cards            # plans everything (minutes), writes results/cards.json
    python -m benchmarks.tables           # then renders the pages from it

Shapes are Llama's from `benchmarks.shapes`, in bf16, one sequence of 2,048 tokens a step: `memrt
plan`, so nothing here was measured on a card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.shapes import llama_config
from memrt.cli.stacks import parse_stack
from memrt.errors import ConflictError
from memrt.planning import plan

__all__ = [
    "BATCH",
    "CARDS",
    "FILE",
    "MODELS",
    "PARTNERED",
    "REFERENCE",
    "SCHEMA",
    "STACKS",
    "Partnered",
    "main",
    "planned",
    "stack_of",
]

SCHEMA = "memrt.cards/1"
FILE = RESULTS / "cards.json"

REFERENCE = "8B"
"""The shape on which every strategy is planned alone."""
MODELS = ("1B", "3B", "8B", "13B", "70B")
_CONDITIONS = ("machine", "platform", "python", "packages", "commit", "date")
BATCH = {"batch_size": 1, "sequence_length": 2048}

STACKS: tuple[tuple[str, str], ...] = (
    ("none", "all weights train, AdamW"),
    ("fused_loss", "the same numbers but for rounding"),
    ("activation_checkpoint+fused_loss", "a third more compute"),
    (
        "activation_checkpoint+fused_loss+offload_activations",
        "and layer inputs wait in host memory",
    ),
    ("activation_checkpoint+fused_loss+int8_states", "moments in 8 bits"),
    (
        "activation_checkpoint+fused_loss+int8_states+galore(rank=256)",
        "the update is of low rank, and no weight's gradient is formed",
    ),
    (
        "activation_checkpoint+fused_loss+int8_states+badam(every=100)",
        "one layer trains at a time",
    ),
    ("nf4+peft+activation_checkpoint+fused_loss", "QLoRA: adapters on weights in 4 bits"),
    ("nf4+ladder+fused_loss", "a side network on weights in 4 bits; no backward through the model"),
    (
        "nf4+ladder(reduction=16, taps='projected', init='principal', checkpoint=True)"
        "+int8_states+fused_loss",
        "a narrower one that keeps nothing of the model and runs again in backward",
    ),
)
"""From the least change of training to the largest, with what changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partnered:
    """How a strategy is planned that a run of `REFERENCE` with default settings refuses alone."""

    stack: str
    without: str = "none"
    """What it is compared with."""
    why: str


_ADAPTERS = "it freezes the whole model, so that it is planned beside LoRA"
_TWO_PASS = (
    "the default max_grad_norm=1 needs every gradient first, so that it is planned with "
    "clip='two_pass'"
)

_SMALL = "activation_checkpoint+fused_loss+int8_states"

PARTNERED: Mapping[str, Partnered] = {
    "nf4": Partnered(stack="nf4+peft", without="peft", why=_ADAPTERS),
    "int8": Partnered(stack="int8+peft", without="peft", why=_ADAPTERS),
    "fused_lora": Partnered(
        stack="peft+fused_lora", without="peft", why="it needs LoRA, whose branch it fuses"
    ),
    "in_backward": Partnered(
        stack=f"{_SMALL}+in_backward(clip='two_pass')",
        without=_SMALL,
        why=f"{_TWO_PASS}, beside what else keeps the peak up: activations, logits, moments",
    ),
    "lomo": Partnered(stack="lomo(clip='two_pass')", why=_TWO_PASS),
    "adalomo": Partnered(stack="adalomo(clip='two_pass')", why=_TWO_PASS),
}
"""Strategies that are not planned alone."""

CARDS: tuple[tuple[str, int], ...] = (
    ("8 GiB", 8 * 2**30),
    ("12 GiB", 12 * 2**30),
    ("16 GiB (T4)", 15_360 * 2**20),
    ("24 GiB (RTX 4090, A10, L4)", 23_028 * 2**20),
    ("32 GiB (RTX 5090)", 32_607 * 2**20),
    ("48 GiB (L40S)", 46_068 * 2**20),
    ("80 GiB (A100, H100)", 81_559 * 2**20),
    ("141 GiB (H200)", 143_771 * 2**20),
)
"""Memory as nvidia-smi shows it; the sources stand in `memrt/gpus.py`."""


def stack_of(name: str) -> str:
    """The stack whose bytes a strategy's page shows."""
    return PARTNERED[name].stack if name in PARTNERED else name


def planned(size: str, stack: str) -> dict[str, Any]:
    """One row: a plan reduced to what the pages show, or why there is none."""
    import torch

    row: dict[str, Any] = {"model": size, "stack": stack}
    try:
        strategies = parse_stack([stack]).strategies
        found = plan(llama_config(size), strategies, dtype=torch.bfloat16, **BATCH)
    except ConflictError as error:
        return {**row, "reason": "; ".join(error.problems)}
    except ValueError as error:
        return {**row, "reason": str(error)}
    report = found.to_json()
    kept = ("peak_bytes", "accounts", "place_peaks", "region", "device_bytes")
    return {**row, "reason": None, **{name: report[name] for name in kept}}


def main(argv: Sequence[str] | None = None) -> int:
    """Plan everything and write the file; `--only` replaces the rows of some stacks."""
    from benchmarks.generated_pages import built_in  # which reads what this writes

    parser = argparse.ArgumentParser(prog="python -m benchmarks.cards")
    parser.add_argument("--only", nargs="+", metavar="STACK", help="plan these, keep other rows")
    arguments = parser.parse_args(argv)
    wanted = [(size, stack) for size in MODELS for stack, _ in STACKS]
    shown = [stack_of(name) for name in built_in()]
    wanted += [(REFERENCE, stack) for stack in shown if (REFERENCE, stack) not in wanted]
    rows = _kept(arguments.only)
    for size, stack in wanted:
        if arguments.only is None or stack in arguments.only:
            rows[(size, stack)] = planned(size, stack)
            peak = rows[(size, stack)].get("peak_bytes")
            print(size, stack, peak, flush=True)
    conditions = plan(llama_config("tiny"), **BATCH).to_json()["conditions"]
    result = {
        "schema": SCHEMA,
        "conditions": {name: conditions[name] for name in _CONDITIONS},
        "rows": [rows[key] for key in wanted if key in rows],
    }
    FILE.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"wrote {FILE.name}; now run python -m benchmarks.tables")
    return 0


def _kept(only: Sequence[str] | None) -> dict[tuple[str, str], dict[str, Any]]:
    if only is None or not FILE.is_file():
        return {}
    rows = json.loads(FILE.read_text("utf-8"))["rows"]
    return {(row["model"], row["stack"]): row for row in rows}


if __name__ == "__main__":
    sys.exit(main())
