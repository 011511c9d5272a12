"""What a run of `memrt train` will need: `memrt.plan` at the largest batch of its data.

With strategies and a memory report also the waterfall: what each of them saves. It takes 2 n - 1
more plans of n strategies (8B in bf16, four strategies: 7 plans, 36 seconds on one core), so that
it is left out where it would take longer than a minute, and the report says so.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from datasets import Dataset
    from torch import Tensor, nn

    from memrt.cli.train_config import TrainConfig
    from memrt.cli.train_model import TrainedModel
    from memrt.data import Collator
    from memrt.planning import Plan
    from memrt.runner import Batch
    from memrt.strategy import Strategy

__all__ = ["TORCH_ADAMW", "largest_batch", "predict"]

TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Names of `optim` that are AdamW, which a plan runs."""

_ROWS_PER_CALL = 4096

_MAX_WATERFALL_SECONDS = 60.0
"""A run does not wait longer for what only its report shows."""

_NOT_PLANNED = (
    ("fp16", "fp16 mixed precision"),
    ("activation_checkpointing", "transformers' own activation checkpointing"),
    ("gradient_checkpointing", "transformers' own activation checkpointing"),
    ("torch_compile", "torch.compile"),
    ("use_liger_kernel", "Liger kernels"),
    ("neftune_noise_alpha", "NEFTune"),
    ("label_smoothing_factor", "label smoothing"),
)
"""Settings of the Trainer that a plan does not run."""


def largest_batch(dataset: Dataset, collator: Collator, *, batch_size: int) -> Batch:
    """The longest example with the shortest ones: as wide as a batch gets, padded where any is."""
    lengths = np.concatenate(
        [
            table["input_ids"].combine_chunks().value_lengths().to_numpy()
            for table in dataset.with_format("arrow").iter(batch_size=_ROWS_PER_CALL)
        ]
    )
    order = np.argsort(-lengths, kind="stable")
    chosen = [order[0], *order[1:][::-1][: batch_size - 1]]
    return collator([dataset[int(index)] for index in chosen])


def predict(
    settings: TrainConfig, model: TrainedModel, dataset: Dataset, collator: Collator
) -> dict[str, Any]:
    """The plan as JSON with its `waterfall`, and in `not_planned` what of the settings it lacks."""
    arguments = settings.arguments
    batch = largest_batch(dataset, collator, batch_size=arguments.per_device_train_batch_size)
    planned = _plan(settings, model, batch, settings.strategies)
    report = planned.to_json()
    report["shape"] = list(batch["input_ids"].shape)
    report["not_planned"] = _left_out(arguments)
    report["waterfall"], report["waterfall_left_out"] = _waterfall(settings, model, batch, planned)
    return report


def _plan(
    settings: TrainConfig, model: TrainedModel, batch: Batch, strategies: Sequence[Strategy]
) -> Plan:
    from memrt.planning import plan

    arguments = settings.arguments
    with warnings.catch_warnings():
        # of torch, where PEFT copies a module that it trains whole
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        return plan(
            # which class code that a model brings makes of a config is not in the config
            partial(model.build, _with(settings, strategies), model.config)
            if model.trusted
            else model.config,
            strategies,
            batch_size=batch["input_ids"].shape[0],
            sequence_length=batch["input_ids"].shape[1],
            dtype=settings.dtype,
            max_grad_norm=arguments.max_grad_norm or 0.0,
            window=[batch] * arguments.gradient_accumulation_steps,
            loss_of=_loss(torch.bfloat16 if arguments.bf16 else None),
        )


def _with(settings: TrainConfig, strategies: Sequence[Strategy]) -> TrainConfig:
    changed = {**settings.values, "strategies": [str(strategy) for strategy in strategies]}
    return replace(settings, values=changed)


def _waterfall(
    settings: TrainConfig, model: TrainedModel, batch: Batch, planned: Plan
) -> tuple[list[dict[str, Any]] | None, str | None]:
    """The rows of `memrt.waterfall`, or why there are none; neither where nobody would see them."""
    from memrt.waterfall import waterfall

    stack = settings.strategies
    if not stack or not settings.arguments.memory_report:
        return None, None
    count = 2 * len(stack) - 1
    if count * planned.seconds > _MAX_WATERFALL_SECONDS:
        return None, (
            f"{count} more plans of about {planned.seconds:.0f} seconds each would have kept the "
            "run waiting; memrt plan --waterfall makes them"
        )
    print(f"planning what every strategy saves ({count} more plans)", file=sys.stderr, flush=True)

    def peak_of(strategies: list[Strategy]) -> int:
        if strategies == sorted(stack, key=lambda strategy: strategy.phase):
            return planned.peak_bytes
        try:
            return _plan(settings, model, batch, strategies).peak_bytes
        except (RuntimeError, NotImplementedError) as error:  # the stack itself can be planned
            raise ValueError(f"{type(error).__name__}: {error}") from error

    return waterfall(stack, peak_of), None


def _left_out(arguments: Any) -> list[str]:
    found = {text: None for name, text in _NOT_PLANNED if getattr(arguments, name, None)}
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if optimizer not in TORCH_ADAMW:
        found[f"optimizer {optimizer} (planned: AdamW)"] = None
    return list(found)


def _loss(mixed: torch.dtype | None) -> Callable[[nn.Module, Batch], Tensor]:
    from memrt.runner import model_loss

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        autocast = nullcontext() if mixed is None else torch.autocast("cpu", dtype=mixed)
        with autocast:
            return model_loss(model, batch)

    return loss_of
