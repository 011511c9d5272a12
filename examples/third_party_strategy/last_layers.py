"""Train the last layers only: everything before them is frozen and keeps nothing.

Of L repeated layers the last `count` train; embeddings, head and the other layers rest. With T
parameters in those layers, gradients are 4 T bytes in place of 4 N, AdamW's state 8 T in place of
8 N, and autograd saves no activations below the first layer that trains. Costs nothing in time; the
lower layers stay as they were. With `count` = L it is full fine-tuning of the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from memrt.profiling.accounts import Account
from memrt.strategy import EVERYTHING, Attachment, Claim, Phase, Promise, Slot, Strategy

if TYPE_CHECKING:
    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["LastLayers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastLayers(Strategy):
    """Settings.

    count: how many layers train, counted from the last.
    """

    name: ClassVar[str] = "last_layers"
    phase: ClassVar[Phase] = Phase.TRAINABLE
    lowers: ClassVar[tuple[Account, ...]] = (
        Account.GRADIENTS,
        Account.OPTIMIZER,
        Account.ACTIVATIONS,
    )
    breaks: ClassVar[frozenset[Promise]] = frozenset({Promise.EVERY_PARAMETER_GETS_A_GRADIENT})

    count: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise ValueError(f"count={self.count!r}: must be a whole number, 1 or more")

    @property
    def uniform_layers(self) -> bool:
        """Layers that train and layers that rest need different bytes."""
        return False

    def check(self, facts: Facts) -> None:
        """Needs that many repeated layers, with something to train in them."""
        num_layers = len(facts.structure.layer_names)
        if self.count > num_layers:
            raise ValueError(
                f"count={self.count} is more than the {num_layers} layers of "
                f"{type(facts.model).__name__}; lower it"
            )
        if not self.trained(facts):
            raise ValueError(f"count={self.count}: those layers have no trainable parameter")

    def trained(self, facts: Facts) -> list[str]:
        """Names of the parameters that train."""
        last = set(facts.structure.layer_names[-self.count :])
        return [name for name, _ in facts.parameters() if facts.structure.layer_of(name) in last]

    def claims(self, facts: Facts) -> list[Claim]:
        """Which parameters train is decided here and nowhere else."""
        return [Claim(slot=Slot.ACTIVE_SET, scope=EVERYTHING)]

    def attach(self, run: Session) -> Attachment:
        """Nothing is changed yet; the first step freezes the others."""
        return _LastLayers(self, run)


class _LastLayers(Attachment):
    settings: LastLayers

    def __init__(self, settings: LastLayers, run: Session) -> None:
        super().__init__(settings, run)
        self._names = settings.trained(run.facts)

    def before_step(self, step: int) -> None:
        """Every step, so that a resumed run needs no state: it does nothing the second time."""
        self.run.activate(self._names)
