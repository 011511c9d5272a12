"""`memrt.choose`: the first stack that fits a budget, with a sentence for every choice.

Candidates come in rungs, from the least change of training to the largest (`memrt.candidates`).
On a rung the cheapest stack that fits is taken: its cost is the FLOPs of the fake run over an
assumed throughput, plus the bytes between device and host over an assumed bandwidth. Both
assumptions only order stacks; neither is a prediction of time.

A rung is skipped when the stack of it that takes the least memory is more than a tenth over the
budget. What the user named stays, and only what goes together with it is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from memrt import registry
from memrt.advice import Remedy, shortfall
from memrt.auto_search import (
    ASSUMED_BYTES_PER_SECOND,
    ASSUMED_FLOPS_PER_SECOND,
    FULL,
    Candidate,
    Search,
)
from memrt.candidates import Rung, bring_parameters, rungs, why
from memrt.gpus import Gpu
from memrt.planning import Plan, Shape, facts_of, plan
from memrt.profiling.report import format_bytes
from memrt.runner import Batch, model_loss
from memrt.structure import RunSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from memrt.strategy import Strategy

__all__ = ["ASSUMED_BYTES_PER_SECOND", "ASSUMED_FLOPS_PER_SECOND", "Candidate", "Choice", "choose"]

ASSUMPTIONS = (
    f"Ordered by FLOPs at {ASSUMED_FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s plus transfers at "
    f"{ASSUMED_BYTES_PER_SECOND / 1e9:.0f} GB/s: assumptions for the order, not predictions of time"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The stack, its plan, and how it came about."""

    strategies: tuple[str, ...]
    """The chosen stack, or the one that takes the least memory where `fits` is False."""
    plan: Plan
    fits: bool
    rung: str
    reasons: tuple[str, ...]
    """A sentence for every strategy of the stack."""
    candidates: tuple[Candidate, ...]
    remedies: tuple[Remedy, ...] = ()
    """What to change, where nothing fits."""
    assumptions: str = ASSUMPTIONS

    def to_json(self) -> dict[str, Any]:
        """Plain values; the plan is a report of its own."""
        return {
            "strategies": list(self.strategies),
            "fits": self.fits,
            "rung": self.rung,
            "reasons": list(self.reasons),
            "rejected": self.rejected(),
            "candidates": [each.to_json() for each in self.candidates],
            "remedies": [each.to_json() for each in self.remedies],
            "assumptions": self.assumptions,
        }

    def rejected(self) -> list[str]:
        """Why the others were not taken; stacks of one rung with one reason share a sentence."""
        groups: dict[tuple[str, str], list[str]] = {}
        for each in self.candidates:
            if each.verdict != "chosen":
                groups.setdefault((each.rung, each.sentence), []).append(each.stack)
        return [f"{_some(stacks)}: {sentence}" for (_, sentence), stacks in groups.items()]

    def explain(self) -> str:
        """The choice in words, one line each."""
        stack = "+".join(self.strategies) or "none"
        head = f"{stack} ({self.rung}): {shortfall(self.plan)}"
        lines = [head if self.fits else f"nothing fits; least memory: {head}"]
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [f"  {sentence}" for sentence in self.rejected()]
        lines += [
            f"  to change: {r.change}" + ("" if r.fits else " (not enough)") for r in self.remedies
        ]
        return "\n".join([*lines, f"  {self.assumptions}."])


def choose(
    model: Any,
    strategies: Sequence[str | Strategy] = (),
    *,
    budget: str,
    host: str | None = None,
    full_parameters: bool = False,
    batch_size: int = 1,
    sequence_length: int = 512,
    accumulation_steps: int = 1,
    dtype: torch.dtype = torch.float32,
    max_grad_norm: float = 1.0,
    window: Sequence[Batch] | None = None,
    loss_of: Callable[[nn.Module, Batch], Tensor] = model_loss,
    on_plan: Callable[[str], None] = lambda stack: None,
    task: str | None = None,
    settings: RunSettings | None = None,
) -> Choice:
    """The stack that changes training least among those that fit `budget` (a card or a size).

    `strategies` stay in every candidate. `full_parameters`: all weights train with AdamW, or
    nothing fits. `model`, `task` and the shapes are those of `memrt.plan`; `on_plan` is told what
    is about to be planned. `settings` are a Trainer's: no stack is chosen that they refuse.
    """
    card = Gpu.parse(budget, argument="budget")
    options: dict[str, Any] = {
        "accumulation_steps": accumulation_steps,
        "dtype": dtype,
        "max_grad_norm": max_grad_norm,
        "window": window,
        "loss_of": loss_of,
        "gpu": budget,
        "host": host,
        "task": task,
    }
    shape = {"batch_size": batch_size, "sequence_length": sequence_length}
    Shape(**shape, accumulation_steps=accumulation_steps)

    def plan_of(stack: Sequence[Strategy], **changed: int) -> Plan:
        on_plan("+".join(map(str, stack)) or "none")
        return plan(model, stack, **{**options, **shape, **changed})

    num_batches = accumulation_steps if window is None else len(window)
    told = replace(
        settings or RunSettings(), max_grad_norm=max_grad_norm, accumulation_steps=num_batches
    )
    search = Search(
        named=tuple(registry.parse_all(strategies)),
        plan_of=plan_of,
        facts=facts_of(model, dtype=dtype, settings=told, task=task),
        budget=card,
    )
    for rung in _rungs(model, told, search.named):
        if full_parameters and not rung.trains_all:
            search.leave_out(rung, FULL)
        elif search.climb(rung):
            break
    return _outcome(search, shapes_are_free=window is None)


def _rungs(model: Any, settings: RunSettings, named: Sequence[Strategy]) -> list[Rung]:
    found = rungs(
        hidden_size=hidden_size_of(model),
        max_grad_norm=settings.max_grad_norm,
        accumulation_steps=settings.accumulation_steps,
    )
    if not bring_parameters(named):
        return found
    own = "what you named"
    return [replace(each, title=each.title.replace("full fine-tuning", own)) for each in found]


def _outcome(search: Search, *, shapes_are_free: bool) -> Choice:
    remedies = []
    if search.chosen is None:
        remedies = search.remedies(shapes_are_free=shapes_are_free)
    taken = search.chosen or search.smallest
    assert taken is not None  # or `remedies` has raised
    rung, stack, found = taken
    return Choice(
        strategies=tuple(map(str, stack)),
        plan=found,
        fits=search.chosen is not None,
        rung=rung.title,
        reasons=tuple(_reason(each, stack, search.named, found) for each in stack),
        candidates=tuple(search.candidates),
        remedies=tuple(remedies),
    )


def hidden_size_of(model: Any) -> int:
    """The width of a model's config; of a function, which has none, an ordinary one."""
    from memrt.loading import resolve_config

    if callable(model) and not hasattr(model, "num_hidden_layers"):
        return 1024
    config = resolve_config(model)
    return int(getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 1024)


def _some(stacks: Sequence[str]) -> str:
    """Stacks that differ in how they keep activations, as few words as that needs."""
    if len(stacks) <= 2:
        return ", ".join(stacks)
    return f"{stacks[0]} and {len(stacks) - 1} more that keep activations otherwise"


def _reason(
    strategy: Strategy, stack: Sequence[Strategy], named: Sequence[Strategy], found: Plan
) -> str:
    if strategy in named:
        return f"{strategy}: you named it"
    text = f"{strategy}: {why(strategy.name, stack)}"
    if strategy.name == "offload_activations":
        moved = format_bytes(found.transfer_bytes)
        text += f" ({moved} moved a step, {format_bytes(found.host_bytes['pinned'])} pinned)"
    return text
