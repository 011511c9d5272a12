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

from memrt.registry import register
from memrt.state_format_strategy import StateFormatStrategy

if TYPE_CHECKING:
    from memrt.structure import Facts

__all__ = ["Int8States"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Int8States(StateFormatStrategy):
    """No settings: block size and thresholds are bitsandbytes'."""

    name: ClassVar[str] = "int8_states"
    state_format: ClassVar[str] = "int8"

    def check(self, facts: Facts) -> None:
        """Needs AdamW as the update rule, and bitsandbytes."""
        StateFormatStrategy.check(self, facts)
        if find_spec("bitsandbytes") is None:
            raise ValueError("bitsandbytes is not installed; run: pip install bitsandbytes")
