"""AdamW's moments in 4 bits, block by block (Li et al.).

Every block of 128 elements is kept as 128 codes, two in a byte, and one fp32 scale: 2 × (1/2 +
4/128) = 1.06 bytes a parameter instead of 8. First moments take the dynamic map of 16 values,
second moments a map without zero, so that no update is divided by a moment that was rounded away.
Parameters with fewer than 4096 elements keep fp32 moments. Costs a coarse rounding of the moments
every step (the weight update uses unrounded ones): compare the loss with `fp8_states` or
`int8_states`, which take one byte more. Needs Triton on CUDA, and no other package.

Formula: `memrt.kernels.adamw_int4`. Source: Li, Chen and Zhu 2023, arXiv 2309.01507, with blocks
and other values for second moments (`memrt.kernels.blockwise_int4` says why).
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

__all__ = ["Int4States"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Int4States(Strategy):
    """No settings: blocks are of 128 elements, as published."""

    name: ClassVar[str] = "int4_states"
    phase: ClassVar[Phase] = Phase.UPDATE
    lowers: ClassVar[tuple[Account, ...]] = (Account.OPTIMIZER,)

    def check(self, facts: Facts) -> None:
        """Needs AdamW as the update rule, and Triton on CUDA."""
        require_adamw(facts)
        on_cuda = any(parameter.is_cuda for parameter in facts.model.parameters())
        if on_cuda and find_spec("triton") is None:
            raise ValueError("triton is not installed; run: pip install triton")

    def claims(self, facts: Facts) -> list[Claim]:
        """The format of every parameter's state."""
        return [Claim(slot=Slot.STATE_FORMAT)]

    def attach(self, run: Session) -> Attachment:
        """Nothing is changed in the model."""
        return _Int4States(self, run)


class _Int4States(Attachment):
    def rules(self) -> list[Rule]:
        """4-bit states for every parameter; the format itself leaves small ones in fp32."""
        return [
            Rule(
                slot=Slot.STATE_FORMAT,
                match=lambda name, parameter: True,
                build=lambda name, parameter: "int4",
            )
        ]
