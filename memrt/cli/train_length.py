"""Whether a run that is resumed is as long as what was trained of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from memrt.checkpoint_loading import read_trainer_state

__all__ = ["checkpoints_in", "require_longer"]


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Checkpoints of a run by their step, in this order."""
    found = {path.name.rpartition("-")[2]: path for path in folder.glob("checkpoint-*")}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdigit()))


def require_longer(checkpoint: Path, arguments: Any, *, num_examples: int | None = None) -> None:
    """Refuse fewer steps than the checkpoint has; exactly as many is a run that was finished.

    Epochs are counted in steps when the data is known, by `num_examples`.
    """
    if arguments.max_steps > 0:
        total, said = arguments.max_steps, f"training.max_steps={arguments.max_steps}"
    elif num_examples is None or arguments.auto_find_batch_size:  # a smaller batch, more steps
        return
    else:
        total = _steps(arguments, num_examples)
        said = f"training.num_train_epochs={arguments.num_train_epochs:g}, {total} steps"
    step = read_trainer_state(checkpoint).global_step
    if total >= step:
        return
    earlier = [path for n, path in checkpoints_in(checkpoint.parent).items() if n <= total]
    remedy = f", or --resume {earlier[-1]}" if earlier else ""
    raise ValueError(f"{said}: the checkpoint is at step {step}; name a larger one{remedy}")


def _steps(arguments: Any, num_examples: int) -> int:
    """Steps of all epochs, as a Trainer counts them."""
    size = int(arguments.train_batch_size)
    batches = num_examples // size if arguments.dataloader_drop_last else -(-num_examples // size)
    steps = max(-(-batches // int(arguments.gradient_accumulation_steps)), 1)
    return math.ceil(float(arguments.num_train_epochs) * steps)
