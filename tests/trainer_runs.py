"""Short training runs under a Trainer, for the trainer tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from memrt import Trainer as MemrtTrainer
from memrt import TrainingArguments
from memrt.profiling.log_values import is_log_value
from memrt.testing import tiny_batches, tiny_model

__all__ = [
    "CHECKPOINTING",
    "Recorder",
    "arguments",
    "assert_equal",
    "assert_same",
    "examples",
    "history",
    "model_of",
    "run",
    "saved_state",
    "trainer_of",
    "weights",
]

CHECKPOINTING = next(  # the name changed within transformers 5
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
)

DROPOUT = {"llama": {"attention_dropout": 0.1}, "gpt2": {}, "bert": {}, "plain": {}}
"""Overrides that turn dropout on (GPT-2 and BERT have it by default)."""


def model_of(family: str, *, seed: int = 7, **overrides: Any) -> nn.Module:
    """A tiny model with given weights; dropout above 0 where the family has dropout."""
    torch.manual_seed(seed)
    return tiny_model(family, **{"layers": 3, **DROPOUT[family], **overrides})


def examples(family: str, *, count: int = 24, length: int = 8) -> list[dict[str, Tensor]]:
    """A dataset of unequal label counts, so that a mean of means is not the mean."""
    batches = tiny_batches(family, count=count // 2, batch=2, length=length)
    return [{key: value[row] for key, value in each.items()} for each in batches for row in (0, 1)]


def arguments(folder: Path, *, cls: type = TrainingArguments, **overrides: Any) -> Any:
    """Quiet arguments on the CPU: six steps, logged and saved at each one."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **overrides,
    }
    return cls(**options)


class Recorder(transformers.TrainerCallback):
    """Writes down which event came when."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(args: Any, state: Any, control: Any, **_: Any) -> None:
            self.events.append(f"{name} {state.global_step}")

        return record


def trainer_of(
    folder: Path,
    *,
    family: str = "llama",
    cls: type = MemrtTrainer,
    arguments_cls: type = TrainingArguments,
    model: nn.Module | None = None,
    options: dict[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """A trainer over a tiny model; `options` go to the Trainer, the rest to its arguments."""
    trainer = cls(
        model=model_of(family) if model is None else model,
        args=arguments(folder, cls=arguments_cls, **overrides),
        train_dataset=examples(family),
        **(options or {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def run(folder: Path, *, resume: str | bool | None = None, **options: Any) -> Any:
    """A trainer that has trained."""
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    """The model's tensors."""
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def history(trainer: Any) -> list[dict[str, Any]]:
    """What was logged, less the fields that a clock or the machine decides."""
    clock = ("runtime", "per_second")
    return [
        {
            key: value
            for key, value in entry.items()
            if not (key.endswith(clock) or is_log_value(key))
        }
        for entry in trainer.state.log_history
    ]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit-equal tensors under equal names."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def saved_state(trainer: Any) -> dict[str, Any]:
    """Optimizer and strategies, as a checkpoint would hold them."""
    return {
        "optimizer": trainer.optimizer.state_dict()["state"],
        "strategies": trainer.session.strategy_state(),
    }


def assert_same(one: Any, other: Any) -> None:
    """Bit-equal tensors and equal values, however they are nested."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours, theirs)
    else:
        assert one == other
