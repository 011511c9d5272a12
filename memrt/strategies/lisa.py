"""LISA: train embeddings, head and a few random layers, and draw other layers every few steps.

Every `every` optimizer steps, `layers` of the L repeated layers are drawn uniformly without
replacement; they train together with everything outside the layers (embeddings, final norm, head),
the other layers are frozen. Gradients and optimizer state exist for what trains now only: with
T = (parameters outside the layers) + `layers` × (parameters of a layer), AdamW's state is 8 T bytes
and never more, because the state of a layer that leaves is freed (`parked="no"`) or waits on the
host (`parked="host"`, which keeps its moments for the next time). A layer whose state was freed
starts its bias correction anew. Costs nothing in time; no gradient is rescaled. Pan et al. 2024,
arXiv 2403.17919 (NeurIPS 2024). With `layers` = L it is AdamW, bit for bit in fp32; bf16 weights
have fp32 moments, which torch's AdamW would not give them, and are rounded stochastically. A step
whose gradients are not finite is skipped and counted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from memrt.active_set import (
    RotatingSet,
    check_rotation,
    refuse_idle_rounding,
    trainable_by_layer,
)
from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategy import Attachment, Claim, Phase, Promise, Slot, Strategy
from memrt.values import check_seed

if TYPE_CHECKING:
    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["Lisa"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Lisa(Strategy):
    """Settings (defaults of LMFlow, the authors' code).

    layers: how many layers train at a time.
    every: optimizer steps between two draws.
    embeddings: whether everything outside the layers trains too.
    parked: where the optimizer state of a layer that leaves goes: "no" (freed), "host", "disk".
    seed: of the draws, which are a function of it and the interval alone.
    """

    name: ClassVar[str] = "lisa"
    phase: ClassVar[Phase] = Phase.TRAINABLE
    lowers: ClassVar[tuple[Account, ...]] = (Account.GRADIENTS, Account.OPTIMIZER)
    needs: ClassVar[frozenset[Promise]] = frozenset({Promise.PARAMETERS_STAY_WHOLE})
    breaks: ClassVar[frozenset[Promise]] = frozenset({Promise.EVERY_PARAMETER_GETS_A_GRADIENT})

    layers: int = 2
    every: int = 20
    embeddings: bool = True
    parked: str = "no"
    seed: int = 42

    def __post_init__(self) -> None:
        if not isinstance(self.layers, int) or isinstance(self.layers, bool) or self.layers < 1:
            raise ValueError(f"layers={self.layers!r}: must be a whole number, 1 or more")
        check_rotation(every=self.every, parked=self.parked)
        if not isinstance(self.embeddings, bool):
            raise ValueError(f"embeddings={self.embeddings!r}: must be True or False")
        check_seed(self.seed)

    @property
    def uniform_layers(self) -> bool:
        """Active and frozen layers are treated differently."""
        return False

    def check(self, facts: Facts) -> None:
        """Needs enough repeated layers with trainable parameters."""
        refuse_idle_rounding(facts)
        if not facts.structure.layer_names:
            raise ValueError(f"{type(facts.model).__name__} has no list of repeated layers to draw")
        count = len(trainable_by_layer(facts)[0])
        if self.layers > count:
            raise ValueError(
                f"layers={self.layers} is more than the {count} layers of this model that have "
                "trainable parameters; lower it"
            )

    def claims(self, facts: Facts) -> list[Claim]:
        """What trains."""
        return [Claim(slot=Slot.ACTIVE_SET)]

    def attach(self, run: Session) -> Attachment:
        """The optimizer is built over all parameters; the first draw comes before step 0."""
        layers, outside = trainable_by_layer(run.facts)
        return _Draws(
            self,
            run,
            blocks=list(layers.values()),
            every=self.every,
            parked=self.parked,
            always=outside if self.embeddings else [],
        )


class _Draws(RotatingSet):
    settings: Lisa

    def _draw(self, interval: int) -> list[int]:
        """Layers of an interval: a function of seed and interval, equal on every rank."""
        generator = random.Random(f"{self.settings.seed}:{interval}")
        return sorted(generator.sample(range(len(self._blocks)), self.settings.layers))
