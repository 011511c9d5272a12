"""Tiny models under strategies, with their gradients, FLOPs and counted bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memrt import registry
from memrt.planning import simulate
from memrt.profiling.accounts import Account
from memrt.profiling.ledger import Ledger
from memrt.profiling.timeline import Record, Timeline
from memrt.runner import Batch, model_loss, start, train_step
from memrt.session import Session
from memrt.structure import RunSettings
from memrt.testing import tiny_batches, tiny_model

__all__ = [
    "Pass",
    "assert_equal",
    "assert_planned",
    "batch_of",
    "counted",
    "gradients",
    "held_for_backward",
    "model_of",
    "one_pass",
    "states",
]


def model_of(family: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny model in training mode with given weights."""
    torch.manual_seed(seed)
    return tiny_model(family, **overrides).train()


def batch_of(family: str, *, seed: int = 0, **shape: int) -> dict[str, Tensor]:
    """One micro-batch."""
    return tiny_batches(family, count=1, seed=seed, **shape)[0]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient that exists, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def states(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """A copy of the optimizer's state by parameter name."""
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: copy.deepcopy(dict(state)) for p, state in optimizer.state.items() if state}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@dataclass(slots=True, kw_only=True)
class Pass:
    """What one forward and backward gave."""

    loss: float
    gradients: dict[str, Tensor]
    rng_state: Tensor
    """Of torch's CPU generator afterwards."""


def one_pass(
    model: nn.Module,
    strategies: Sequence[Any],
    batches: Sequence[Batch],
    *,
    seed: int = 3,
    autocast: bool = False,
    around: Callable[[], Any] | None = None,
) -> Pass:
    """Forward and backward of every micro-batch under a session, which is detached afterwards."""
    session = Session(model, registry.parse_all(strategies))
    torch.manual_seed(seed)
    total = 0.0
    for batch in batches:
        with session.micro_batch():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model_loss(model, batch)
            session.backward(loss)
        total += float(loss.detach())
        del loss
    result = Pass(loss=total, gradients=gradients(model), rng_state=torch.get_rng_state())
    session.detach()
    model.zero_grad()
    return result


def counted(
    model: nn.Module,
    strategies: Sequence[Any],
    window: Sequence[Batch],
    *,
    steps: int = 2,
    **settings: Any,
) -> Timeline:
    """The ledger's log of a few optimizer steps."""
    ledger = Ledger()
    with ledger:
        run = start(
            model,
            registry.parse_all(strategies),
            settings=RunSettings(**settings),
            ledger=ledger,
        )
        for _ in range(steps):
            train_step(run, window)
    run.session.detach()
    return ledger.timeline


def assert_planned(
    build: Callable[[], nn.Module], strategies: Sequence[Any], window: Sequence[Batch]
) -> None:
    """The plan of two steps is what the ledger counts in them: peak, accounts and phases."""
    parsed, settings = registry.parse_all(strategies), RunSettings()
    planned = simulate(build, parsed, window, settings=settings)
    timeline = counted(build(), strategies, window)
    peak = timeline.peak()
    assert planned.peak.peak_bytes == peak.peak_bytes
    assert planned.peak.accounts == peak.accounts
    assert planned.phases() == timeline.phase_peaks()
    assert planned.account_maxima == timeline.account_maxima()


def held_for_backward(model: nn.Module, strategies: Sequence[Any], batch: Batch) -> list[Record]:
    """The storages that are kept for backward when the forward of a micro-batch is over."""
    ledger = Ledger()
    with ledger:
        session = Session(model, registry.parse_all(strategies), ledger=ledger)
        with session.micro_batch():
            loss = model_loss(model, batch)
            end_of_forward = ledger.timeline.now - 1
            session.backward(loss)
            del loss
    session.detach()
    model.zero_grad()
    timeline = ledger.timeline
    return [
        record
        for record in timeline.alive_at(end_of_forward)
        if record.account_at(end_of_forward) is Account.ACTIVATIONS
    ]
