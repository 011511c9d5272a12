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
from typing import TYPE_CHECKING, ClassVar

from memrt.registry import register
from memrt.state_format_strategy import StateFormatStrategy, require_triton_on_cuda

if TYPE_CHECKING:
    from memrt.structure import Facts

__all__ = ["Int4States"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Int4States(StateFormatStrategy):
    """No settings: blocks are of 128 elements, as published."""

    name: ClassVar[str] = "int4_states"
    state_format: ClassVar[str] = "int4"

    def check(self, facts: Facts) -> None:
        """Needs AdamW as the update rule, and Triton on CUDA."""
        StateFormatStrategy.check(self, facts)
        require_triton_on_cuda(facts)
