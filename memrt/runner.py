"""One run of a session over given batches: the code that `plan`, `profile` and `compare` share.

`plan` calls it under fake tensors, the others on real ones. That they run the same lines is what
makes a plan equal to a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memrt.errors import NonFiniteLossError
from memrt.session import Session

if TYPE_CHECKING:
    from memrt.profiling.ledger import Ledger
    from memrt.strategy import Strategy
    from memrt.structure import RunSettings

__all__ = ["Batch", "Run", "alike", "copied", "evaluate", "model_loss", "start", "train_step"]

Batch = Mapping[str, Tensor]

_CONTENT = frozenset(
    {
        *("input_ids", "decoder_input_ids", "token_type_ids"),
        *("labels", "start_positions", "end_positions"),
    }
)
"""Texts and labels: no bytes depend on their values."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model returns when it is given labels."""
    output = model(**batch)
    loss = output["loss"] if isinstance(output, Mapping) else output[0]
    if loss is None:
        raise ValueError(f"{type(model).__name__} returned no loss; its batch needs labels")
    result: Tensor = loss
    return result


@dataclass(slots=True, kw_only=True)
class Run:
    """A model with its session, and what came out so far."""

    session: Session
    loss_of: Callable[[nn.Module, Batch], Tensor] = model_loss
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)


def start(
    model: nn.Module,
    strategies: Sequence[Strategy],
    *,
    settings: RunSettings,
    ledger: Ledger | None = None,
    loss_of: Callable[[nn.Module, Batch], Tensor] = model_loss,
    probe: Batch | None = None,
) -> Run:
    """Attach the strategies and build the optimizer.

    `probe` is a batch for strategies that look at data before the first step, given to them as
    often as they ask.
    """
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # as transformers' Trainer does for training
    model.train()
    batches = None if probe is None else partial(repeat, probe)
    session = Session(model, strategies, settings=settings, ledger=ledger, probe_batches=batches)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    session.adopt_optimizer(session.build_optimizer([{"params": named}]))
    return Run(session=session, loss_of=loss_of)


def copied(window: Sequence[Batch], device: torch.device | None = None) -> list[Batch]:
    """The batches in tensors of their own, as a data loader gives every step its own."""
    return [
        {name: tensor.to(device or tensor.device, copy=True) for name, tensor in batch.items()}
        for batch in window
    ]


def alike(window: Sequence[Batch]) -> bool:
    """Whether the micro-batches of a step take the same bytes, as far as anybody can tell.

    They do where their shapes are the same and, of masks, whether there is padding: a model makes
    no mask of its own from one without. Whatever else is no text and no label must be equal.
    """
    first, *others = window
    return all(
        other.keys() == first.keys()
        and all(_same(name, first[name], other[name]) for name in first)
        for other in others
    )


def _same(name: str, one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if name in _CONTENT or one.is_floating_point():
        return True
    if name.endswith("mask"):
        return bool(one.all()) is bool(other.all())
    return torch.equal(one, other)


def train_step(run: Run, window: Sequence[Batch], *, read_values: bool = True) -> None:
    """One optimizer step over the micro-batches of `window`; appends loss and gradient norm.

    `read_values=False` for fake tensors, which have none. The loss is the mean over the window.
    """
    session = run.session
    total = None
    for index, batch in enumerate(window):
        loss = session.train_micro_batch(
            lambda batch=batch: run.loss_of(session.model, batch) / len(window),  # type: ignore[misc]
            last=index == len(window) - 1,
        )
        total = loss if total is None else total + loss
    if read_values and total is not None:
        value = float(total)
        if not math.isfinite(value):
            raise NonFiniteLossError(step=session.step_index + 1, loss=value, checkpoint=None)
        run.losses.append(value)
    norm = session.step()
    if read_values and norm is not None:
        run.gradient_norms.append(float(norm))


def evaluate(run: Run, batch: Batch) -> Tensor:
    """The loss of a batch as a Trainer evaluates it: no graph, and the loss alone."""
    model = run.session.model
    model.eval()
    try:
        with torch.no_grad(), run.session.loss_only():
            return run.loss_of(model, batch)
    finally:
        model.train()
