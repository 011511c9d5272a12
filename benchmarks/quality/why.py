"""Why a method ends above AdamW on GSM8K: runs in which one thing is changed.

    MEMRT_DATA=folder python -m benchmarks.quality.why FOLDER

FOLDER is that of `benchmarks.quality.run`, whose base model is trained if there is none. The papers
of LISA, GaLore, AdaLomo and BAdam report losses at AdamW's level, from longer runs of wider models
(LOMO is SGD, which AdaLomo's paper shows behind). Each variant here gives a method more of what a
short run of a narrow model takes from it: steps for every layer, layers at a time, rank, a higher
learning rate, one rate for all that trains. What the change gives back is told beside the method's
own row and AdamW's, from the same base. Resumable; about 80 minutes of one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.base_model import TRAINING_TEXTS, train_base_model
from benchmarks.quality.methods import BASELINE, METHODS, Method
from benchmarks.quality.run import train_once
from benchmarks.record import RESULTS, conditions, make_record, write_record

__all__ = ["VARIANTS", "Variant", "main", "markdown"]

NAME = "quality_why"
CLAIM = "On GSM8K, what gives back what a method loses against AdamW in a short run."
GOAL = "explained, not judged: each method beside a run of it in which one thing is changed"
TASK = "gsm8k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method of the comparison, or that method with one thing changed."""

    method: str
    change: str = ""
    strategies: tuple[str, ...] = ()
    """In place of the method's, where the change is one of them."""
    learning_rate: float
    steps: int = 150


VARIANTS = (
    Variant(method=BASELINE, learning_rate=1e-3),
    Variant(method="lisa", learning_rate=3e-3),
    Variant(
        method="lisa",
        change="4 of 8 layers at a time, not 2",
        strategies=("lisa(layers=4, every=10)",),
        learning_rate=3e-3,
    ),
    Variant(
        method="lisa",
        change="new layers every 50 steps, not 10",
        strategies=("lisa(every=50)",),
        learning_rate=3e-3,
    ),
    Variant(method="lisa", change="twice the steps", learning_rate=3e-3, steps=300),
    Variant(method="galore", learning_rate=3e-3),
    Variant(
        method="galore",
        change="rank 160 of 320, not 64",
        strategies=("galore(rank=160, every=50)",),
        learning_rate=3e-3,
    ),
    Variant(
        method="galore",
        change="scale 1 at AdamW's rate, not 0.25",
        strategies=("galore(rank=64, every=50, scale=1.0)",),
        learning_rate=1e-3,
    ),
    Variant(method="lomo", learning_rate=1.0),
    Variant(method="lomo", change="rate 3, not 1", learning_rate=3.0),
    Variant(method="adalomo", learning_rate=8e-3),
    Variant(method="adalomo", change="rate 0.02, not 0.008", learning_rate=2e-2),
    Variant(method="badam, embeddings and head too", learning_rate=3e-3),
    Variant(
        method="badam, embeddings and head too",
        change="three times the steps",
        learning_rate=3e-3,
        steps=450,
    ),
)


def _run(variant: Variant, *, folder: Path, data: Path) -> dict[str, Any]:
    method = METHODS[variant.method]
    slug = variant.method.replace(",", "").replace(" ", "_")
    if variant.strategies:
        method = Method(strategies=variant.strategies, overrides=method.overrides)
        slug = "".join(each if each.isalnum() else "_" for each in " ".join(variant.strategies))
    report = train_once(
        folder / "runs" / f"{TASK}-{slug}-{variant.learning_rate:g}-{variant.steps}",
        base=folder / "model",
        data=data,
        task=TASK,
        method=method,
        lr=variant.learning_rate,
        steps=variant.steps,
    )
    keys = ("evaluation_loss", "loss", "peak_bytes", "account_maxima")
    return {
        **asdict(variant),
        "strategies": list(method.strategies),
        **{key: report[key] for key in keys},
    }


def _outcome(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reference = next(row["evaluation_loss"] for row in rows if row["method"] == BASELINE)
    beside = [{**row, "above_adamw": row["evaluation_loss"] - reference} for row in rows]
    changed = [row for row in beside if row["change"]]
    words = "; ".join(
        f"{row['method']}, {row['change']}: {row['above_adamw']:+.3f} above AdamW"
        for row in changed
    )
    words = words or f"AdamW {reference:.3f}"
    return {"repetitions": list(rows), "summary": {"rows": beside}, "met": None, "reason": words}


def markdown(record: Mapping[str, Any]) -> str:
    """A row for each run: what is changed, its loss and bytes."""
    lines = [
        "| method | changed | steps | rate | held-out loss | above AdamW | peak, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["summary"]["rows"]:
        cells = (
            row["method"],
            row["change"],
            str(row["steps"]),
            f"{row['learning_rate']:g}",
            f"{row['evaluation_loss']:.3f}",
            f"{row['above_adamw']:+.3f}",
            f"{row['peak_bytes'] / (1 << 20):.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.why",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where base model and runs are kept")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: benchmarks/results")
    options = parser.parse_args(argv)
    data = Path(os.environ.get("MEMRT_DATA", "")).resolve()
    if not (data / TRAINING_TEXTS[0]).is_file():
        parser.error(f"MEMRT_DATA={str(data)!r} must name the folder with the texts")
    found = conditions(configuration={"task": TASK}, device="cpu")
    if train_base_model(options.folder, data):
        return 1
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        rows.append(_run(variant, folder=options.folder, data=data))
        outcome = _outcome(rows)
        record = make_record(name=NAME, claim=CLAIM, goal=GOAL, found=found, outcome=outcome)
        print(f"wrote {write_record(record, options.output)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
