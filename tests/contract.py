"""What every registered strategy is held to: settings for tiny models and a short training run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import memrt
from memrt import registry
from memrt.compose import conflicts
from memrt.errors import ConflictError
from memrt.profiling.ledger import Ledger
from memrt.profiling.timeline import Timeline
from memrt.runner import model_loss
from memrt.session import Session
from memrt.structure import Facts, RunSettings, discover
from memrt.testing import (
    FAMILIES,
    PARTNERS,
    SPECS,
    STACKS,
    specs,
    tiny_batches,
    tiny_model,
)

__all__ = [
    "FAMILIES",
    "PARTNERS",
    "ROUNDED",
    "SPECS",
    "STACKS",
    "Outcome",
    "advance",
    "refusal",
    "session_state",
    "specs",
    "tensors_equal",
    "train",
]

ROUNDED = frozenset({"int8", "nf4"})
"""Strategies that round the model's own weights, once, when they are attached."""


@dataclass(slots=True)
class Outcome:
    """A short run: its losses, its session and (with a ledger) its timeline."""

    model: nn.Module
    session: Session
    losses: list[float] = field(default_factory=list)
    timeline: Timeline | None = None

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {k: v.detach().clone() for k, v in self.model.state_dict().items()}


def refusal(family: str, names: Sequence[str]) -> str | None:
    """Why this stack cannot run on this family; None when it can."""
    model = tiny_model(family)
    facts = Facts(model=model, structure=discover(model), settings=RunSettings())
    problems = conflicts(registry.parse_all(specs(names)), facts)
    return str(ConflictError(problems)) if problems else None


def begin(
    family: str, names: Sequence[str], *, ledger: Ledger | None = None, **options: Any
) -> Outcome:
    """A fresh model with its strategies attached."""
    torch.manual_seed(0)
    model = tiny_model(family).train()
    settings = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0, **options}
    session = memrt.prepare(model, specs(names), ledger=ledger, **settings)
    return Outcome(model=model, session=session)


def advance(outcome: Outcome, family: str, *, steps: int, first: int = 0) -> Outcome:
    """Train `steps` optimizer steps of two micro-batches; batches depend on the step alone."""
    for step in range(first, first + steps):
        torch.manual_seed(1000 + step)  # dropout of the step, equal in every run
        window = tiny_batches(family, count=2, seed=step)
        for index, batch in enumerate(window):
            with outcome.session.micro_batch(last=index == 1):
                loss = model_loss(outcome.model, batch) / 2
                outcome.session.backward(loss)
            outcome.losses.append(float(loss.detach()))
            del loss
        outcome.session.step()
    return outcome


def train(
    family: str,
    names: Sequence[str],
    *,
    steps: int = 4,
    with_ledger: bool = False,
    **options: Any,
) -> Outcome:
    """Begin and advance."""
    if not with_ledger:
        return advance(begin(family, names, **options), family, steps=steps)
    ledger = Ledger()
    with ledger:
        outcome = advance(begin(family, names, ledger=ledger, **options), family, steps=steps)
    ledger.close()
    outcome.timeline = ledger.timeline
    return outcome


def session_state(outcome: Outcome) -> dict[str, Any]:
    """Model and run state as a checkpoint would hold them."""
    return copy.deepcopy({"model": outcome.model.state_dict(), "run": outcome.session.state_dict()})


def tensors_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )
