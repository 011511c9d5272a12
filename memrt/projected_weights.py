"""What strategies that project linear weights share: which weights, their settings, their runtime.

A subclass of `ProjectedStrategy` says how one weight is projected (`projection`); its optimizer
part, refusals, staggering, state and checkpoints are here.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from memrt.optimizer_slots import require_adamw
from memrt.profiling.accounts import Account
from memrt.strategy import EVERYTHING, Attachment, Claim, Phase, Rule, Slot, Strategy
from memrt.values import is_number

if TYPE_CHECKING:
    import torch

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["TARGETS", "ProjectedAttachment", "ProjectedStrategy", "is_conv1d"]

ALL_LINEAR = "all-linear"
TARGETS = ("all", "attention", "mlp", ALL_LINEAR)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectedStrategy(Strategy):
    """Settings that every projection has.

    rank: of the space. A weight whose smaller side is not above it keeps plain AdamW.
    every: optimizer steps between two changes of a weight's projection.
    scale: factor on the projected update.
    targets: linear weights of the repeated layers: "all", "attention" or "mlp"; "all-linear": those
        of the head too; or a list of parts of names and of regular expressions for whole names.
    """

    phase: ClassVar[Phase] = Phase.UPDATE

    rank: int = 128
    every: int = 200
    scale: float = 0.25
    targets: str | tuple[str, ...] = "all"

    def __post_init__(self) -> None:
        for option in ("rank", "every"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{option}={value!r}: must be a whole number, 1 or more")
        if not (is_number(self.scale) and 0 < self.scale < inf):
            raise ValueError(f"scale={self.scale!r}: must be a number above 0")
        object.__setattr__(self, "targets", _checked_targets(self.targets))

    @property
    def uniform_layers(self) -> bool:
        """An expression may tell one layer from another."""
        names = () if isinstance(self.targets, str) else self.targets
        return all(re.fullmatch(r"[a-zA-Z_]+", name) for name in names)

    def check(self, facts: Facts) -> None:
        """Needs AdamW and linear weights in repeated layers."""
        require_adamw(facts)
        found = [name.removesuffix(".weight") for name in self.candidates(facts)]
        kind = type(facts.model).__name__
        if not isinstance(self.targets, str):
            for target in self.targets:
                if not any(_names(target, name) for name in found):
                    raise ValueError(
                        f"targets: {target!r} matches no trainable linear weight of {kind}; give "
                        "a part of a module's name, or an expression for the whole name"
                    )
        elif not found:
            place = "of" if self.targets == ALL_LINEAR else "in the layers of"
            wider = {"all": ALL_LINEAR, ALL_LINEAR: None}.get(self.targets, "all")
            widened = "" if wider is None else f"use targets={wider!r}, "
            raise ValueError(
                f"targets={self.targets!r} matches no trainable linear weight {place} {kind}; "
                f"{widened}train some of them (requires_grad), or use another strategy"
            )

    def serves(self, module: nn.Module) -> bool:
        """Whether the weight of this linear layer can be projected."""
        return True

    def candidates(self, facts: Facts) -> dict[str, nn.Parameter]:
        """Every weight that `targets` names, whatever its rank."""
        found = {}
        for name, module in facts.model.named_modules():
            if not (isinstance(module, nn.Linear) or is_conv1d(module)) or not self.serves(module):
                continue
            weight_name, weight = f"{name}.weight", module.weight
            if (
                self._wants(name, facts)
                and isinstance(weight, nn.Parameter)
                and weight.requires_grad
                and weight_name not in facts.structure.tied
            ):
                found[weight_name] = weight
        return found

    def _wants(self, module: str, facts: Facts) -> bool:
        if not isinstance(self.targets, str):
            return any(_names(target, module) for target in self.targets)
        if self.targets == ALL_LINEAR:
            return True
        if facts.structure.layer_of(module) is None:
            return False
        attention = facts.structure.is_attention(module)
        return self.targets == "all" or attention == (self.targets == "attention")

    def projected(self, facts: Facts) -> list[str]:
        """Names of the weights that are projected; the others are below the rank."""
        return [
            name for name, weight in self.candidates(facts).items() if min(weight.shape) > self.rank
        ]

    def state_formats(self, facts: Facts) -> dict[str, frozenset[str]]:
        """The parameters whose state must have a format, by format; others are the run's."""
        return {}

    def claims(self, facts: Facts) -> list[Claim]:
        """The projection of the projected weights, and the state formats that it asks for."""
        projections = Claim(slot=Slot.PROJECTION, scope=frozenset(self.projected(facts)))
        formats = self.state_formats(facts).values()
        return [projections, *(Claim(slot=Slot.STATE_FORMAT, scope=scope) for scope in formats)]

    def offset(self, index: int, count: int) -> int:
        """The first refresh after step 0 of weight `index` of `count`: spread over an interval."""
        return index * self.every // count

    def projection(
        self, shape: tuple[int, int], *, index: int, offset: int, device: torch.device
    ) -> Any:
        """The projection of one weight."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it projects")

    def attach(self, run: Session) -> Attachment:
        """Make the projections; the model is left as it is."""
        return ProjectedAttachment(self, run)


def _checked_targets(targets: Any) -> str | tuple[str, ...]:
    if isinstance(targets, str):
        if targets not in TARGETS:
            raise ValueError(
                f"targets={targets!r}: use one of {', '.join(TARGETS)}, or a list of names"
            )
        return targets
    names = tuple(targets) if isinstance(targets, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"targets={targets!r}: must be a name, or a list such as ['q_proj']")
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"targets: {name!r} is no regular expression ({error})") from None
    return names


def _names(target: str, module: str) -> bool:
    """As transformers' `optim_target_modules`: a part of the name, or all of it matches."""
    return target in module or re.fullmatch(target, module) is not None


def is_conv1d(module: nn.Module) -> bool:
    """transformers' `Conv1D` (GPT-2): y = x W + b with W [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _stacked(facts: Facts) -> list[str]:
    """Trainable weights of the layers that stack several matrices: fused experts."""
    return [n for n, p in facts.parameters() if p.ndim == 3 and facts.structure.layer_of(n)]


def _format_rule(label: str, scope: frozenset[str]) -> Rule:
    return Rule(
        slot=Slot.STATE_FORMAT,
        match=lambda name, parameter: scope == EVERYTHING or name in scope,
        build=lambda name, parameter: label,
    )


class ProjectedAttachment(Attachment):
    """The projections of a run, by the names of their weights."""

    settings: ProjectedStrategy

    def __init__(self, settings: ProjectedStrategy, run: Session) -> None:
        super().__init__(settings, run)
        names = settings.projected(run.facts)
        bypassed = len(settings.candidates(run.facts)) - len(names)
        if bypassed:
            logger.warning(
                "%s: rank=%d is not below the smaller side of %d weights; they keep AdamW",
                settings.name,
                settings.rank,
                bypassed,
            )
        stacked = _stacked(run.facts)
        if stacked:
            logger.warning(
                "%s: %d weights such as %s hold several experts each and are no linear layer's; "
                "they keep AdamW",
                settings.name,
                len(stacked),
                stacked[0],
            )
        self.subspaces: dict[str, Any] = {}
        for index, name in enumerate(names):
            weight = run.model.get_parameter(name)
            self.subspaces[name] = settings.projection(
                (weight.shape[0], weight.shape[1]),
                index=index,
                offset=settings.offset(index, len(names)),
                device=weight.device,
            )

    def rules(self) -> list[Rule]:
        """The projection of every projected weight, and state formats where they are asked for."""
        formats = self.settings.state_formats(self.run.facts)
        return [
            Rule(
                slot=Slot.PROJECTION,
                match=lambda name, parameter: name in self.subspaces,
                build=lambda name, parameter: self.subspaces[name],
            ),
            *(_format_rule(label, scope) for label, scope in formats.items()),
        ]

    def before_step(self, step: int) -> None:
        """Tell every projection which step it is: some change."""
        for subspace in self.subspaces.values():
            subspace.begin_step(step)

    def after_step(self, step: int) -> None:
        """Free what belongs to one step."""
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Drop projected gradients; what they are projected with stays."""
        for subspace in self.subspaces.values():
            subspace.clear()

    def tensors(self) -> list[tuple[Tensor, Account]]:
        """What the projections keep is optimizer state."""
        return [
            (tensor, Account.OPTIMIZER)
            for subspace in self.subspaces.values()
            for tensor in subspace.tensors().values()
        ]

    def state_dict(self) -> dict[str, Any]:
        """What every projection keeps, by weight."""
        return {name: subspace.state_dict() for name, subspace in self.subspaces.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; refuses the state of other weights."""
        if state.keys() != self.subspaces.keys():
            raise ValueError(
                f"the checkpoint holds {self.name} state for {len(state)} weights, this run "
                f"projects {len(self.subspaces)}; resume with the same rank and targets"
            )
        for name, subspace in self.subspaces.items():
            subspace.load_state_dict(state[name])
