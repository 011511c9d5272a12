"""The parameter groups of a Trainer's AdamW, for the optimizer that memrt composes in its place.

transformers makes two groups, for decay and none; a Trainer of the user's may make others, such as
one for each layer with a rate of its own. They are taken over by parameter, with all that they say
of rates and decays; what the composed optimizer cannot heed is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memrt.errors import ConflictError
from memrt.strategy import Slot
from memrt.structure import RunSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memrt.session import Session

__all__ = ["groups_of"]

_OTHER_RULES = ("amsgrad", "maximize")
_IMPLEMENTATION = (
    *("foreach", "capturable", "differentiable", "fused"),  # the same numbers in another way
    *("decoupled_weight_decay", "param_names"),
)
_DEFAULTS = {"betas": RunSettings().betas, "eps": RunSettings().epsilon}


def groups_of(
    optimizer: torch.optim.AdamW, session: Session, model: nn.Module
) -> list[dict[str, Any]]:
    """The groups of torch's AdamW as `Session.build_optimizer` takes them.

    `model`: whose names the strategies' rules are to see.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    held = {parameter for group in groups for parameter in group["params"]}
    problem = _strange_parameters(held, names) or next(filter(None, map(_unheeded, groups)), None)
    if problem is None and _has_another_rule(session):
        problem = next(filter(None, map(_without_effect, groups)), None)
    if problem is not None:
        bringing = ", ".join(a.name for a in session.attachments if a.rules())
        raise ConflictError(
            [f"the Trainer's create_optimizer {problem}; {bringing} cannot take its groups over"]
        )
    alone = tuple(_DEFAULTS) if _has_another_rule(session) else ()
    left_out = {*_IMPLEMENTATION, *_OTHER_RULES, *alone}
    return [
        {key: value for key, value in group.items() if key not in left_out}
        | {"params": [(names[p], p) for p in group["params"] if p.requires_grad]}
        for group in groups
    ]


def _has_another_rule(session: Session) -> bool:
    return any(rule.slot is Slot.UPDATE_RULE for rule in session.rules())


def _strange_parameters(held: set[nn.Parameter], names: dict[nn.Parameter, str]) -> str | None:
    strangers = sum(parameter not in names for parameter in held)
    if strangers:
        return f"trains {strangers} tensors that are no parameters of the model"
    missing = [name for p, name in names.items() if p.requires_grad and p not in held]
    if missing:
        return (
            f"leaves out {missing[0]} (the first of {len(missing)} that train): call "
            "requires_grad_(False) on them before the Trainer is made"
        )
    return None


def _unheeded(group: dict[str, Any]) -> str | None:
    found = next((name for name in _OTHER_RULES if group.get(name)), None)
    return None if found is None else f"sets {found}=True, which memrt's AdamW has not"


def _without_effect(group: dict[str, Any]) -> str | None:
    for name, default in _DEFAULTS.items():
        if group[name] != default:
            return f"sets {name}={group[name]!r}, which is AdamW's alone"
    return None
