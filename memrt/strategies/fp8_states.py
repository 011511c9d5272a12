"""AdamW's moments in FP8, each group of 128 stretched to its own range (COAT).

A group's values are raised to a power k that spreads them over E4M3 before they are rounded, and k
(one byte) is kept with the largest magnitude (fp32): 2 × (1 + 5/128) = 2.08 bytes a parameter
instead of 8. The second moment is never rounded to zero, and groups that are constant, zero or met
an infinite gradient stay sound. Parameters with fewer than 4096 elements keep fp32 moments. Costs a
rounding of the moments every step; the weight update uses unrounded ones. Needs no other package:
Triton on CUDA, PyTorch on the CPU (compiled for parameters of 262144 elements or more).

Formula: `memrt.kernels.adamw_fp8`. Source: Xi et al. 2024, arXiv 2410.19313.
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

__all__ = ["Fp8States"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8States(Strategy):
    """No settings: groups are of 128 elements, as published."""

    name: ClassVar[str] = "fp8_states"
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
        return _Fp8States(self, run)


class _Fp8States(Attachment):
    def rules(self) -> list[Rule]:
        """FP8 states for every parameter; the format itself leaves small ones in fp32."""
        return [
            Rule(
                slot=Slot.STATE_FORMAT,
                match=lambda name, parameter: True,
                build=lambda name, parameter: "fp8",
            )
        ]
