"""Settings of strategies that update in backward; `memrt.backward_updates` does what they say.

clip: by the global norm, which needs every gradient before the first update, with `"two_pass"`.
embeddings: `False` leaves what lies outside the repeated layers to the step: those gradients stay
until it, 4 bytes an element (2 in bf16), and the layers' alone are applied in backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from memrt.active_set import trainable_by_layer
from memrt.backward_updates import BackwardUpdates, refuse_reentrant, refuse_sparse
from memrt.optimizer_slots import require_adamw
from memrt.profiling.accounts import Account
from memrt.strategy import EVERYTHING, Attachment, Claim, Phase, Promise, Rule, Slot, Strategy
from memrt.structure import RunSettings

if TYPE_CHECKING:
    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["RuleInBackward", "UpdateInBackward"]

CLIP = ("none", "two_pass")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateInBackward(Strategy):
    """What strategies that own the time of update have in common.

    clip: "none", or "two_pass" for `max_grad_norm` and for steps that are skipped as a whole.
    embeddings: whether everything outside the layers is updated in backward too, or at the step.
    """

    phase: ClassVar[Phase] = Phase.UPDATE
    lowers: ClassVar[tuple[Account, ...]] = (Account.GRADIENTS,)
    needs: ClassVar[frozenset[Promise]] = frozenset({Promise.PARAMETERS_STAY_WHOLE})
    # parameters do rest while the step reads them: layers that are run again and micro-batches that
    # are summed see the weights of forward
    breaks: ClassVar[frozenset[Promise]] = frozenset({Promise.GRADIENTS_OUTLIVE_BACKWARD})

    clip: str = "none"
    embeddings: bool = True

    def __post_init__(self) -> None:
        if self.clip not in CLIP:
            raise ValueError(f"clip={self.clip!r}: use one of {', '.join(CLIP)}")
        if not isinstance(self.embeddings, bool):
            raise ValueError(f"embeddings={self.embeddings!r}: must be True or False")

    @property
    def clips(self) -> bool:
        """Whether the norm of all gradients is known before the first update."""
        return self.clip == "two_pass"

    @property
    def sums_micro_batches(self) -> bool:
        """Whether gradients of several micro-batches are kept until the last, and then applied."""
        return True

    def check(self, facts: Facts) -> None:
        """Needs the composed optimizer, dense gradients, no clipping that it cannot do."""
        require_adamw(facts)
        if facts.settings.max_grad_norm > 0 and not self.clips:
            raise ValueError(
                f"max_grad_norm={facts.settings.max_grad_norm:g} needs every gradient before the "
                "first update, and here each is applied and freed in backward; use "
                f"{self.name}(clip='two_pass') (exact, a second backward pass) or max_grad_norm=0"
            )
        if self.clips and facts.settings.liger_kernels:
            raise ValueError(
                "use_liger_kernel=True writes gradients over what forward saved, and "
                "clip='two_pass' runs backward over it twice; use use_liger_kernel=False, or "
                "clip='none' with max_grad_norm=0"
            )
        if facts.settings.accumulation_steps > 1 and not self.sums_micro_batches:
            steps = facts.settings.accumulation_steps
            raise ValueError(f"gradient_accumulation_steps={steps}: {self.refusal_of_sums()}")
        refuse_reentrant(facts.model)
        refuse_sparse(facts.model)
        self.in_backward(facts)

    def refusal_of_sums(self) -> str:
        """What is said where a step has several micro-batches and gradients are not kept."""
        return (
            "several micro-batches a step need the sum of their gradients, and here each is "
            "applied and freed in backward; use one micro-batch a step (larger, with "
            f"activation_checkpoint), or {self.name}(clip='two_pass'), which keeps every gradient "
            "until the last micro-batch"
        )

    def in_backward(self, facts: Facts) -> frozenset[str]:
        """Names of the parameters that are updated in backward; all others wait for the step."""
        layers, outside = trainable_by_layer(facts)
        inside = [name for names in layers.values() for name in names]
        if self.embeddings:
            return frozenset([*inside, *outside])
        if not outside:
            raise ValueError(
                "embeddings=False has no effect: nothing outside the layers trains; leave it out"
            )
        if not inside:
            raise ValueError(
                f"embeddings=False leaves nothing of {type(facts.model).__name__} to update in "
                "backward: it has no repeated layers with trainable parameters; leave it out"
            )
        return frozenset(inside)

    def claims(self, facts: Facts) -> list[Claim]:
        """The time of updates, of every one or of the layers'; with two passes the backward too."""
        scope = EVERYTHING if self.embeddings else self.in_backward(facts)
        time = Claim(slot=Slot.UPDATE_TIME, scope=scope)
        return [time, Claim(slot=Slot.BACKWARD)] if self.clips else [time]

    def rules(self, settings: RunSettings) -> list[Rule]:
        """What the optimizer must be made of."""
        return []

    def attach(self, run: Session) -> Attachment:
        """A hook on every trainable parameter."""
        return BackwardUpdates(self, run)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleInBackward(UpdateInBackward):
    """A preset: an update rule of its own, in backward. Its state is all its own, too."""

    lowers: ClassVar[tuple[Account, ...]] = (Account.GRADIENTS, Account.OPTIMIZER)

    @property
    def sums_micro_batches(self) -> bool:
        """Only beside two passes: the one-pass rule never has more than one gradient."""
        return self.clips

    def check(self, facts: Facts) -> None:
        """AdamW's own settings have no effect."""
        UpdateInBackward.check(self, facts)
        settings, default = facts.settings, RunSettings()
        for name in ("betas", "epsilon"):
            value = getattr(settings, name)
            if value != getattr(default, name):
                raise ValueError(f"{name}={value!r} is AdamW's and has no effect here; leave it")

    def claims(self, facts: Facts) -> list[Claim]:
        """The whole of the optimizer."""
        owned = (Slot.UPDATE_RULE, Slot.STATE_FORMAT, Slot.PROJECTION)
        return [*UpdateInBackward.claims(self, facts), *(Claim(slot=slot) for slot in owned)]

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The optimizer, which must be one that `StepsParameters`."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """What it is made with beside `lr`, `weight_decay` and how bf16 weights are rounded."""
        return {}

    def rules(self, settings: RunSettings) -> list[Rule]:
        """The update rule of every parameter."""
        rounding = {
            "stochastic_rounding": settings.stochastic_rounding,
            "rounding_seed": settings.seed,
        }
        return [
            Rule(
                slot=Slot.UPDATE_RULE,
                match=lambda name, parameter: True,
                build=lambda name, parameter: self.optimizer_class(),
                options=rounding | self.options(),
            )
        ]
