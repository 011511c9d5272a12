"""AdamW's moments in 8 bits, block by block.

Every block of 256 elements is kept as 256 codes of one byte and one fp32 scale (its largest
magnitude); codes follow the dynamic map of Dettmers et al. 2021, arXiv 2110.02861. State falls from
8 to 2 × (1 + 4/256) = 2.03 bytes a parameter. Parameters with fewer than 4096 elements keep fp32
moments. The arithmetic is bitsandbytes', behind an operator of ours, so that plan and ledger see
plain tensors. Costs a rounding of the moments every step; the weight update uses unrounded ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from memrt.optimizer_slots import require_adamw
from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategy import Attachment, Claim, Phase, Rule, Slot, Strategy

if TYPE_CHECKING:
    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["Int8States"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Int8States(Strategy):
    """No settings: block size and thresholds are bitsandbytes'."""

    name: ClassVar[str] = "int8_states"
    phase: ClassVar[Phase] = Phase.UPDATE
    lowers: ClassVar[tuple[Account, ...]] = (Account.OPTIMIZER,)

    def check(self, facts: Facts) -> None:
        """Needs AdamW as the update rule, and bitsandbytes."""
        require_adamw(facts)
        if find_spec("bitsandbytes") is None:
            raise ValueError("bitsandbytes is not installed; run: pip install bitsandbytes")

    def claims(self, facts: Facts) -> list[Claim]:
        """The format of every parameter's state."""
        return [Claim(slot=Slot.STATE_FORMAT)]

    def attach(self, run: Session) -> Attachment:
        """Nothing is changed in the model."""
        return _Int8States(self, run)


class _Int8States(Attachment):
    def rules(self) -> list[Rule]:
        """8-bit states for every parameter; the format itself leaves small ones in fp32."""
        return [
            Rule(
                slot=Slot.STATE_FORMAT,
                match=lambda name, parameter: True,
                build=lambda name, parameter: "int8",
            )
        ]
