"""Q-GaLore: GaLore with a four-bit basis, 8-bit moments, and refreshes only where they are needed.

`galore` (see there), without the gradient, with three changes: the basis P [m, r] is kept in four
bits, two codes a byte, in groups of 256 with a scale and a minimum in bf16; the moments of every
parameter are 8-bit (`int8_states`); and a weight whose subspace rests is refreshed half as often:
its interval doubles whenever the mean overlap of its last 5 refreshes was `lazy` or more.

Bytes per projected weight: basis (1/2 + 4/256) m r, moments 2.03 n r (8 n r where they have fewer
than 4096 elements), gradient 4 n r. Costs what `galore` does, less for the refreshes that are left
out, and P restored to fp32 for a product: 4 m r of workspace.

Zhang et al. 2024, arXiv 2407.08296. The overlap is that of whole subspaces, corrected for chance,
where the authors' code takes the cosine of the first vector alone, sign included; its queue is
emptied when the interval doubles. Their weights in 8 bits that are trained are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from memrt.registry import register
from memrt.strategies.galore import Galore
from memrt.strategies.int8_states import Int8States
from memrt.strategy import EVERYTHING

if TYPE_CHECKING:
    from memrt.structure import Facts

__all__ = ["QGalore"]

STATE_FORMATS = ("int8", "float32")


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class QGalore(Galore):
    """Settings: those of `galore`, with the paper's basis and threshold, and one more.

    state_format: of every parameter's moments: "int8", or "float32" to leave them as they are or to
        another strategy (`fp8_states`).
    """

    name: ClassVar[str] = "q_galore"

    basis: str = "int4"
    lazy: float | None = 0.4
    state_format: str = "int8"

    def __post_init__(self) -> None:
        Galore.__post_init__(self)
        if self.state_format not in STATE_FORMATS:
            raise ValueError(
                f"state_format={self.state_format!r}: use one of {', '.join(STATE_FORMATS)}"
            )
        if self.moments == "rotated" and self.state_format != "float32":
            raise ValueError(
                "moments='rotated' would round moments of 8 bits once more at every refresh; give "
                "state_format='float32' too, or leave it out"
            )

    def check(self, facts: Facts) -> None:
        """What `galore` needs, and what `int8_states` needs."""
        Galore.check(self, facts)
        if self.state_format == "int8":
            Int8States().check(facts)

    def state_formats(self, facts: Facts) -> dict[str, frozenset[str]]:
        """8 bits for every parameter; the format itself leaves small ones in fp32."""
        return {"int8": EVERYTHING} if self.state_format == "int8" else {}
