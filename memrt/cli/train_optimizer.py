"""Whether the optimizer and the schedule of a run can be made, asked before its data is read.

A Trainer makes both when its model is loaded and the run is planned, which may be an hour later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.utils import is_liger_kernel_available

__all__ = ["require_optimizer"]

_STEPS = 1000
"""Of the schedule that is tried where epochs say how long the run is."""


def require_optimizer(arguments: Any) -> None:
    """Refuse packages that are missing, and options that an optimizer or a schedule has not."""
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(
            "training.use_liger_kernel=true: liger-kernel is not installed; install it (pip "
            "install liger-kernel), or leave it out"
        )
    optim, schedule = (_word(arguments.optim), _word(arguments.lr_scheduler_type))
    with _named(f"training.optim={optim!r}, optim_args={arguments.optim_args!r}"):
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    steps = arguments.max_steps if arguments.max_steps > 0 else _STEPS
    options = arguments.lr_scheduler_kwargs
    with _named(f"training.lr_scheduler_type={schedule!r}, lr_scheduler_kwargs={options!r}"):
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


@contextmanager
def _named(settings: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError, OverflowError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{settings}: {text}") from error
