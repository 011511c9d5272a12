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
from memrt.testing import FAMILIES, tiny_batches, tiny_model

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
    "tensors_equal",
    "train",
]

SPECS: dict[str, str] = {
    "activation_checkpoint": "activation_checkpoint",
    "apollo": "apollo(rank=4, every=3)",
    "apollo_mini": "apollo_mini(every=3, scale=32.0)",
    "adalomo": "adalomo(clip='two_pass')",
    "badam": "badam(every=2)",
    "fira": "fira(rank=4, every=3)",
    "fp8_states": "fp8_states",
    "fused_lora": "fused_lora",
    "fused_loss": "fused_loss(chunk_tokens=8)",
    "galore": "galore(rank=4, every=3)",
    "int8": "int8",
    "in_backward": "in_backward(clip='two_pass')",
    "int4_states": "int4_states",
    "int8_states": "int8_states",
    "ladder": "ladder(reduction=2, taps='low_rank', seed=5)",
    "lisa": "lisa(layers=1, every=2)",
    "nf4": "nf4",
    "lomo": "lomo(clip='two_pass')",
    "offload_activations": "offload_activations(min_bytes=0)",
    "peft": "peft(rank=4, dropout=0.1)",
    "q_galore": "q_galore(rank=4, every=3)",
}
"""Every registered strategy with settings that bite on a model of a few thousand parameters."""

PARTNERS: dict[str, list[str]] = {"fused_lora": ["peft"], "int8": ["peft"], "nf4": ["peft"]}
"""Strategies that do not run alone, and what the contract gives them beside."""

ROUNDED = frozenset({"int8", "nf4"})
"""Strategies that round the model's own weights, once, when they are attached."""

STACKS: list[list[str]] = [
    ["activation_checkpoint", "offload_activations"],
    ["lisa", "int8_states"],
    ["galore", "int8_states"],
    ["galore", "fp8_states"],
    ["galore", "activation_checkpoint"],
    ["galore", "lisa"],
    ["galore(rank=4, every=3, form='plain')", "lisa"],
    ["apollo", "int8_states", "activation_checkpoint", "lisa"],
    ["fira", "int8_states", "lisa"],
    ["q_galore", "activation_checkpoint", "lisa"],
    ["ladder", "int8_states", "offload_activations"],
    ["badam", "int8_states", "activation_checkpoint"],
    ["galore", "in_backward", "int8_states"],
    ["adalomo", "activation_checkpoint"],
    ["activation_checkpoint", "offload_activations", "lisa", "int8_states"],
    ["nf4", "peft", "activation_checkpoint"],
    ["nf4", "peft", "fused_lora", "offload_activations"],
    ["int8", "peft", "int8_states", "offload_activations"],
]
"""Stacks that must train on every family; each also with `fused_loss` where there is a head."""


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


def specs(names: Sequence[str]) -> list[str]:
    """Names to specs, each with its partners; what is already a spec stays."""
    partners = [partner for name in names for partner in PARTNERS.get(name, [])]
    return [SPECS.get(name, name) for name in dict.fromkeys([*names, *partners])]


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
