"""Composing the one optimizer of a run from the rules that strategies give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memrt.strategy import Rule, Slot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memrt.session import Session
    from memrt.structure import Facts, RunSettings

__all__ = [
    "build_optimizer",
    "composed_adamw",
    "first_match",
    "needs_memrt",
    "require_adamw",
    "updates_in_backward",
    "wide_moments",
]


def require_adamw(facts: Facts) -> None:
    """Refuse another update rule: the composed optimizer's rule is AdamW."""
    if facts.settings.optimizer != "adamw":
        raise ValueError(
            f"optimizer={facts.settings.optimizer!r} brings its own state; use AdamW "
            "(optim='adamw_torch_fused', the default)"
        )


def composed_adamw(run: Session) -> list[Rule]:
    """Asks for memrt's AdamW as it is, where torch's would be built; a user's optimizer stays."""
    if run.facts.settings.optimizer != "adamw":
        return []
    return [
        Rule(
            slot=Slot.ACTIVE_SET,
            match=lambda name, parameter: True,
            build=lambda name, parameter: "float32 moments",
        )
    ]


def wide_moments(run: Session) -> list[Rule]:
    """`composed_adamw` where torch's would keep the moments of what trains in bf16 or fp16."""
    trained = (parameter for parameter in run.model.parameters() if parameter.requires_grad)
    narrow = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in trained)
    return composed_adamw(run) if narrow else []


def needs_memrt(rules: Sequence[Rule]) -> bool:
    """Whether rules bring what a user's optimizer has not; `composed_adamw` takes that as well."""
    return any(rule.slot is not Slot.ACTIVE_SET for rule in rules)


def updates_in_backward(session: Session) -> bool:
    """Whether parameters change before backward is over."""
    return any(rule.slot is Slot.UPDATE_TIME for rule in session.rules())


def first_match(
    rules: Sequence[Rule], slot: Slot, name: str, parameter: nn.Parameter
) -> Rule | None:
    """The rule that fills a slot for a parameter; the first match wins."""
    for rule in rules:
        if rule.slot is slot and rule.match(name, parameter):
            return rule
    return None


def _other_optimizer(
    rules: Sequence[Rule], groups: Sequence[dict[str, Any]], options: dict[str, Any]
) -> torch.optim.Optimizer | None:
    """What a rule for `Slot.UPDATE_RULE` brings in AdamW's place; None without one."""
    named = [item for group in groups for item in group["params"]]
    found = [first_match(rules, Slot.UPDATE_RULE, *item) for item in named]
    rule = next((rule for rule in found if rule is not None), None)
    if rule is None:
        return None
    if any(other is not rule for other in found):
        raise ValueError(
            "update rules that serve a part of the parameters are not composed; let one strategy "
            "own the update rule of every parameter"
        )
    kept = [
        {**group, "params": [p for _, p in group["params"]]} for group in groups if group["params"]
    ]
    shared = {key: options[key] for key in ("lr", "weight_decay")}
    optimizer: torch.optim.Optimizer = rule.build(*named[0])(kept, **shared, **rule.options)
    return optimizer


def build_optimizer(
    rules: Sequence[Rule], groups: list[dict[str, Any]], settings: RunSettings
) -> tuple[torch.optim.Optimizer, dict[nn.Parameter, Any]]:
    """AdamW with the state formats and projections that the rules give, and the projections.

    `groups` hold `params` as (name, parameter) pairs. Without rules it is torch's fused AdamW. A
    rule for `Slot.UPDATE_RULE` brings another optimizer, for every parameter; one for another slot
    (the update time, the active set) is served by memrt's AdamW as it is.
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if not rules:
        plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
        return torch.optim.AdamW(plain, fused=True, **options), {}
    if settings.splits_parameters:  # such as of adapters in bf16, which are known only by now
        raise ValueError(
            f"{settings.sharded} exchanges parameters for parts of them, and memrt's AdamW, which "
            f"takes those of this run, needs them whole; leave {settings.sharded} out, or let what "
            "trains be fp32"
        )
    other = _other_optimizer(rules, groups, options)
    if other is not None:
        return other, {}
    from memrt.optimizers.adamw import AdamW

    projections: dict[nn.Parameter, Any] = {}
    composed: list[dict[str, Any]] = []
    for group in groups:
        by_format: dict[str, list[nn.Parameter]] = {}
        for name, parameter in group["params"]:
            state_format = first_match(rules, Slot.STATE_FORMAT, name, parameter)
            label = state_format.build(name, parameter) if state_format else "float32"
            by_format.setdefault(label, []).append(parameter)
            projection = first_match(rules, Slot.PROJECTION, name, parameter)
            if projection is not None:
                projections[parameter] = projection.build(name, parameter)
        composed.extend(
            {**group, "params": parameters, "state_format": label}
            for label, parameters in by_format.items()
        )
    optimizer = AdamW(
        composed,
        projections=projections,
        stochastic_rounding=settings.stochastic_rounding,
        rounding_seed=settings.seed,
        **options,
    )
    return optimizer, projections
