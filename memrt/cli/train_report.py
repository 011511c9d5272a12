"""The report of `memrt train`: losses, speed, and memory as predicted, counted and watched."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memrt.checkpoint import write_json, write_text
from memrt.cli.train_plan import TORCH_ADAMW
from memrt.profiling.render import print_report, to_markdown
from memrt.profiling.render_html import to_html
from memrt.profiling.report import conditions

if TYPE_CHECKING:
    from memrt.cli.train_config import TrainConfig
    from memrt.cli.train_model import TrainedModel
    from memrt.data import PreparedData

__all__ = ["COUNTED", "conditions_of", "deliver", "read_counted"]

COUNTED = (
    *("peak_bytes", "accounts", "places", "owners", "region", "phases", "top_allocations"),
    *("account_maxima", "num_counted_steps", "monitor", "timeline"),
)
"""What the Trainer's memory report tells; None where there is none."""


def read_counted(folder: Path) -> dict[str, Any]:
    """What the Trainer's memory report says, or that of a run that this one goes on with."""
    try:
        found = json.loads((folder / "memrt" / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    return {name: found.get(name) for name in COUNTED}


def conditions_of(
    settings: TrainConfig, model: TrainedModel, data: PreparedData, *, tokenizer: str, trainer: Any
) -> dict[str, Any]:
    """Hardware, versions, commit and what was trained how."""
    arguments = settings.arguments
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    return conditions(
        settings={
            "model": model.name,
            "task": model.task,
            "weights": "loaded" if model.has_weights else "random",
            "num_parameters": sum(p.numel() for p in trainer.model.parameters()),
            "data": data.summary.train.source,
            "tokenizer": tokenizer,
            "batch_size": arguments.per_device_train_batch_size,
            "sequence_length": settings.data.sequence_length,
            "accumulation_steps": arguments.gradient_accumulation_steps,
            "dtype": settings.values["dtype"],
            "mixed_precision": trainer.accelerator.mixed_precision,
            "optimizer": "AdamW" if optimizer in TORCH_ADAMW else optimizer,
            "learning_rate": arguments.learning_rate,
            "scheduler": str(getattr(arguments.lr_scheduler_type, "value", "")),
            "max_grad_norm": arguments.max_grad_norm,
            "weight_decay": arguments.weight_decay,
            "seed": settings.seed,
        },
        strategies=[str(strategy) for strategy in settings.strategies],
        device=str(arguments.device),
    )


def deliver(report: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """Print first, and write even where nobody reads what is printed.

    So neither a full disk nor a closed pipe loses the result.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a Δ
    try:
        if as_json:
            print(json.dumps(report, indent=2, allow_nan=False))
        else:
            print_report(report)
        sys.stdout.flush()
    finally:
        _write(report, folder / "memrt")


def _write(report: dict[str, Any], folder: Path) -> None:
    try:
        write_text(folder / "report.md", to_markdown(report))
        write_text(folder / "report.html", to_html(report))
        write_json(folder / "report.json", report)
    except OSError as error:
        raise OSError(
            f"the report could not be written to {folder} ({error.strerror or error}); what was "
            "trained is whole: free space, and run the command again with --resume"
        ) from error
