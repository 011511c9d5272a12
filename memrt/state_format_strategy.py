"""What strategies share that keep AdamW's moments in fewer bits: a state format for everything.

The format itself (`memrt.optimizers.state_formats`) leaves small parameters in fp32. A strategy's
file says what its format is, costs and comes from, and what it needs to be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from memrt.optimizer_slots import require_adamw
from memrt.profiling.accounts import Account
from memrt.strategy import Attachment, Claim, Phase, Promise, Rule, Slot, Strategy

if TYPE_CHECKING:
    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["StateFormatStrategy", "require_triton_on_cuda"]


def require_triton_on_cuda(facts: Facts) -> None:
    """Refuse a model on a GPU where Triton is not installed."""
    on_cuda = any(parameter.is_cuda for parameter in facts.model.parameters())
    if on_cuda and find_spec("triton") is None:
        raise ValueError("triton is not installed; run: pip install triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFormatStrategy(Strategy):
    """A strategy that gives every parameter's moments one state format, and changes no model."""

    phase: ClassVar[Phase] = Phase.UPDATE
    lowers: ClassVar[tuple[Account, ...]] = (Account.OPTIMIZER,)
    needs: ClassVar[frozenset[Promise]] = frozenset({Promise.PARAMETERS_STAY_WHOLE})
    state_format: ClassVar[str]

    def check(self, facts: Facts) -> None:
        """Needs AdamW as the update rule."""
        require_adamw(facts)

    def claims(self, facts: Facts) -> list[Claim]:
        """The format of every parameter's state."""
        return [Claim(slot=Slot.STATE_FORMAT)]

    def attach(self, run: Session) -> Attachment:
        """Nothing is changed in the model."""
        return _StateFormat(self, run)


class _StateFormat(Attachment):
    settings: StateFormatStrategy

    def rules(self) -> list[Rule]:
        """The state format, for every parameter."""
        return [
            Rule(
                slot=Slot.STATE_FORMAT,
                match=lambda name, parameter: True,
                build=lambda name, parameter: self.settings.state_format,
            )
        ]
