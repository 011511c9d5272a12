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
from typing import TYPE_CHECKING, ClassVar

from memrt.registry import register
from memrt.state_format_strategy import StateFormatStrategy, require_triton_on_cuda

if TYPE_CHECKING:
    from memrt.structure import Facts

__all__ = ["Fp8States"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8States(StateFormatStrategy):
    """No settings: groups are of 128 elements, as published."""

    name: ClassVar[str] = "fp8_states"
    state_format: ClassVar[str] = "fp8"

    def check(self, facts: Facts) -> None:
        """Needs AdamW as the update rule, and Triton on CUDA."""
        StateFormatStrategy.check(self, facts)
        require_triton_on_cuda(facts)
