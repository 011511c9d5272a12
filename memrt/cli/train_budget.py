"""`memrt train ... memory_budget=24GiB`: the strategies of a run, chosen before its model loads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset

    from memrt.cli.train_config import TrainConfig
    from memrt.cli.train_model import TrainedModel
    from memrt.data import Collator

__all__ = ["with_saved_choice", "within_budget"]


def with_saved_choice(settings: TrainConfig, saved: TrainConfig) -> TrainConfig | None:
    """The settings with the strategies that the run was given when it began.

    None where it had another budget, or was not given every strategy that is named now.
    """
    budget = settings.values.get("memory_budget")
    if budget is None or budget != saved.values.get("memory_budget"):
        return None
    if not all(strategy in saved.strategies for strategy in settings.strategies):
        return None
    chosen = saved.values["strategies"]
    return replace(settings, values={**settings.values, "strategies": chosen})


def within_budget(
    settings: TrainConfig,
    model: TrainedModel,
    dataset: Dataset,
    collator: Collator,
    say: Callable[[str], None],
) -> TrainConfig:
    """The settings with the strategies that fit `memory_budget`; as they are without one."""
    budget = settings.values.get("memory_budget")  # runs of before it have none
    if budget is None:
        return settings
    from memrt.arguments import settings_of
    from memrt.auto import choose
    from memrt.auto_trainer import autocast_loss, require_fitting
    from memrt.cli.train_plan import largest_batch

    arguments = settings.arguments
    batch = largest_batch(dataset, collator, batch_size=arguments.per_device_train_batch_size)
    choice = require_fitting(
        choose(
            model.config,
            settings.strategies,
            budget=budget,
            batch_size=batch["input_ids"].shape[0],
            sequence_length=batch["input_ids"].shape[1],
            dtype=settings.dtype,
            max_grad_norm=arguments.max_grad_norm or 0.0,
            window=[batch] * arguments.gradient_accumulation_steps,
            loss_of=autocast_loss(torch.bfloat16 if arguments.bf16 else None),
            on_plan=lambda stack: say(f"planning {stack}"),
            settings=settings_of(arguments),
        )
    )
    say(choice.explain())
    return replace(settings, values={**settings.values, "strategies": list(choice.strategies)})
