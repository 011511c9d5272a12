"""Everything that a measured run needs, from the flags."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import argparse

    from memrt.cli.model import Model
    from memrt.cli.progress import Progress
    from memrt.measure import Workload
    from memrt.structure import RunSettings

__all__ = ["device_for", "settings_for", "workload_for"]


def device_for(text: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {text}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {text}: torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    return device


def settings_for(arguments: argparse.Namespace) -> RunSettings:
    """The optimizer's settings of a real run."""
    from memrt.structure import RunSettings

    return RunSettings(
        learning_rate=arguments.learning_rate,
        max_grad_norm=arguments.max_grad_norm,
        accumulation_steps=arguments.accumulation_steps,
        seed=arguments.seed,
    )


def workload_for(
    arguments: argparse.Namespace, model: Model, progress: Progress
) -> tuple[Model, Workload]:
    """Everything that a measured run needs, on the device where it runs.

    Also returns the model, a classifier with the classes of the data.
    """
    from memrt.cli.batches import batches_for
    from memrt.measure import Workload

    device = device_for(arguments.device)
    model, batches = batches_for(arguments, model, progress, num_steps=arguments.steps)
    batch_size, sequence_length = batches.shape
    workload = Workload(
        build=partial(model.load, device=device),
        windows=batches.windows,
        evaluation=batches.evaluation,
        settings=settings_for(arguments),
        device=device,
        description={
            "model": model.name,
            "weights": "loaded" if model.has_weights else "random",
            **batches.description,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "accumulation_steps": arguments.accumulation_steps,
            "steps": arguments.steps,
            "dtype": str(model.dtype).removeprefix("torch."),
            "optimizer": "AdamW",
            "learning_rate": arguments.learning_rate,
            "max_grad_norm": arguments.max_grad_norm,
            "seed": arguments.seed,
        },
    )
    return model, workload
