"""Which strategies can run together: claims on slots, promises needed and broken, all at once.

The trainer's own settings take part under the same rules as strategies (`participants`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from memrt.errors import ConflictError
from memrt.strategy import EVERYTHING, Claim, Promise, Slot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from memrt.strategy import Strategy
    from memrt.structure import Facts, RunSettings

__all__ = ["MARK", "Participant", "check_all", "conflicts", "explain", "refuse_second_session"]

MARK = "_memrt_strategies"
"""The attribute of a model that names the strategies attached to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """One party of a composition: a strategy or a setting of the trainer."""

    name: str
    claims: tuple[Claim, ...] = ()
    needs: frozenset[Promise] = frozenset()
    breaks: frozenset[Promise] = frozenset()


def _settings(settings: RunSettings, strategies: Sequence[Strategy]) -> list[Participant]:
    outlive = Promise.GRADIENTS_OUTLIVE_BACKWARD
    rest = Promise.PARAMETERS_REST_IN_BACKWARD
    every = Promise.EVERY_PARAMETER_GETS_A_GRADIENT
    formed = Promise.GRADIENT_IS_FORMED
    whole = Promise.PARAMETERS_STAY_WHOLE
    found = []
    if settings.max_grad_norm > 0 and not any(strategy.clips for strategy in strategies):
        found.append(
            Participant(
                name=f"max_grad_norm={settings.max_grad_norm:g}", needs=frozenset({outlive})
            )
        )
    if settings.accumulation_steps > 1:
        found.append(
            Participant(
                name=f"gradient_accumulation_steps={settings.accumulation_steps}",
                needs=frozenset({rest}),
            )
        )
    if settings.fp16:
        found.append(Participant(name="fp16=True", needs=frozenset({outlive, rest, formed})))
    if settings.gradient_checkpointing:
        found.append(
            Participant(name="gradient_checkpointing=True", claims=(Claim(slot=Slot.RECOMPUTE),))
        )
    if settings.sharded:
        found.append(
            Participant(
                name=settings.sharded,
                needs=frozenset({outlive, formed, every}),
                breaks=frozenset({whole} if settings.splits_parameters else ()),
            )
        )
    return found


def participants(strategies: Sequence[Strategy], facts: Facts) -> list[Participant]:
    """Strategies and settings as equal parties."""
    return _settings(facts.settings, strategies) + [
        Participant(
            name=strategy.name,
            claims=tuple(strategy.claims(facts)),
            needs=strategy.needs,
            breaks=strategy.breaks,
        )
        for strategy in strategies
    ]


def _scope_text(scope: frozenset[str]) -> str:
    if scope == EVERYTHING:
        return "every parameter and module"
    first = sorted(scope)[0]
    return first if len(scope) == 1 else f"{first} and {len(scope) - 1} more"


def _pair(one: Participant, other: Participant) -> list[str]:
    problems = []
    for claim in one.claims:
        for theirs in other.claims:
            scope = claim.overlap(theirs)
            if scope:
                problems.append(
                    f"{one.name} and {other.name} both own the {claim.slot.value} of "
                    f"{_scope_text(scope)}; drop one of them"
                )
    for breaker, needer in ((one, other), (other, one)):
        for promise in sorted(breaker.breaks & needer.needs, key=lambda p: p.name):
            problems.append(
                f"{needer.name} needs that {promise.value}, which {breaker.name} breaks; "
                "drop one of them"
            )
    return problems


def conflicts(strategies: Sequence[Strategy], facts: Facts) -> list[str]:
    """Every reason why this stack cannot run on this model, empty when it can."""
    problems = []
    for strategy in strategies:
        try:
            strategy.check(facts)
            strategy.check_stack([other for other in strategies if other is not strategy], facts)
        except ValueError as refused:
            problems.append(f"{strategy.name}: {refused}")
    if problems:
        return problems  # claims of a strategy that the model cannot serve mean nothing
    if strategies and facts.settings.data_parallel:
        problems.append(
            f"{', '.join(s.name for s in strategies)}: torch's DataParallel copies the model every "
            "step and loses a strategy's hooks; show one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )
    for one, other in combinations(participants(strategies, facts), 2):
        problems.extend(_pair(one, other))
    return problems


def check_all(strategies: Sequence[Strategy], facts: Facts) -> None:
    """Raise `ConflictError` with every problem, before anything is touched."""
    problems = conflicts(strategies, facts)
    if problems:
        raise ConflictError(problems)


def explain(strategies: Sequence[Strategy], facts: Facts) -> str:
    """The stack in words: order, what each owns and breaks, and the conflicts if there are any."""
    lines = []
    for strategy, party in zip(
        strategies, participants(strategies, facts)[-len(strategies) :], strict=False
    ):
        owned = ", ".join(
            f"{claim.slot.value} of {_scope_text(claim.scope)}" for claim in party.claims
        )
        lines.append(f"{strategy.phase.name.lower():<11} {strategy}: owns {owned or 'nothing'}")
        lines.extend(f"{'':<11}   breaks: {promise.value}" for promise in party.breaks)
    problems = conflicts(strategies, facts)
    lines.extend(f"conflict: {problem}" for problem in problems)
    return "\n".join(lines)


def refuse_second_session(model: nn.Module, strategies: Sequence[Strategy]) -> None:
    """Strategies on top of another session's would wrap layers twice and inherit frozen ones."""
    attached = vars(model).get(MARK)
    if attached and strategies:
        raise ValueError(
            f"this model already carries {', '.join(attached)} of another session; call its "
            "detach() (trainer.session.detach()) or load the model anew"
        )
