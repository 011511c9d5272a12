"""BAdam: AdamW on one block of the model at a time, the next block every few steps.

The blocks are the D repeated layers and, if asked for, the embeddings and the head. Every `every`
optimizer steps the next block trains and everything else is frozen: in a new random order in every
round through the blocks, from the input up, or from the output down. What is in no block is never
trained, but a head that begins at random numbers, as a classifier's does, should train in every
step (`head="always"`, as the authors advise). Gradients and optimizer state exist for one block of
B parameters, and such a head: AdamW's state is 8 B bytes and never more (freed at a switch, so that
moments and bias correction begin anew; with `parked` they wait there for the block's next turn).
Below the block no gradient is computed: on average the backward pass is half as long. Luo et al.
2024, arXiv 2404.02827 (NeurIPS 2024), whose fp32 copy of the active block is not made: bf16 weights
have fp32 moments and are rounded stochastically, so that small updates count in the mean. A step
whose gradients are not finite is skipped and counted.
"""

from __future__ import annotations

import logging
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

__all__ = ["Badam"]

logger = logging.getLogger(__name__)

ORDERS = ("random", "ascending", "descending")


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Badam(Strategy):
    """Settings (defaults of the authors' code).

    every: optimizer steps of a block's turn (the paper advises 50 to 100).
    order: of the blocks: "random" (another permutation each round), "ascending", "descending".
    embeddings: whether what lies before the layers makes a block of its own.
    head: whether what lies after the layers (final norm, head) makes a block of its own, or, with
        "always", trains in every turn and keeps its state.
    parked: where the optimizer state of a block that leaves goes: "no" (freed), "host", "disk".
    seed: of the random order, which is a function of it and the round alone.
    """

    name: ClassVar[str] = "badam"
    phase: ClassVar[Phase] = Phase.TRAINABLE
    lowers: ClassVar[tuple[Account, ...]] = (Account.GRADIENTS, Account.OPTIMIZER)
    needs: ClassVar[frozenset[Promise]] = frozenset({Promise.PARAMETERS_STAY_WHOLE})
    breaks: ClassVar[frozenset[Promise]] = frozenset({Promise.EVERY_PARAMETER_GETS_A_GRADIENT})

    every: int = 50
    order: str = "random"
    embeddings: bool = False
    head: bool | str = False
    parked: str = "no"
    seed: int = 42

    def __post_init__(self) -> None:
        check_rotation(every=self.every, parked=self.parked)
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}: use one of {', '.join(ORDERS)}")
        if not isinstance(self.embeddings, bool):
            raise ValueError(f"embeddings={self.embeddings!r}: must be True or False")
        if not (isinstance(self.head, bool) or self.head == "always"):
            raise ValueError(f"head={self.head!r}: must be True, False or 'always'")
        check_seed(self.seed)

    @property
    def uniform_layers(self) -> bool:
        """The active layer and the frozen ones are treated differently."""
        return False

    def check(self, facts: Facts) -> None:
        """Needs repeated layers, and parameters for every block that is asked for."""
        refuse_idle_rounding(facts)
        layers, _ = trainable_by_layer(facts)
        if not layers:
            raise ValueError(
                f"{type(facts.model).__name__} has no list of repeated layers with trainable "
                "parameters to take turns"
            )
        before, after = _outside(facts)
        if self.embeddings and not before:
            raise ValueError("embeddings=True: nothing before the layers is trainable; leave it")
        if self.head and not after:
            raise ValueError(
                f"head={self.head!r}: nothing after the layers is trainable; leave it (a head that "
                "is tied to the embeddings trains with them, embeddings=True)"
            )

    def claims(self, facts: Facts) -> list[Claim]:
        """What trains."""
        return [Claim(slot=Slot.ACTIVE_SET)]

    def blocks(self, facts: Facts) -> list[list[str]]:
        """The parameter names of every block, from the input up."""
        before, after = _outside(facts)
        layers, _ = trainable_by_layer(facts)
        return [
            *([before] if self.embeddings else []),
            *layers.values(),
            *([after] if self.head is True else []),
        ]

    def attach(self, run: Session) -> Attachment:
        """The optimizer is built over all parameters; the first block is chosen before step 0."""
        _, after = _outside(run.facts)
        if after and not self.head and run.facts.structure.head is None:
            logger.warning(
                "badam: %s, ... stay as they are; a new head should train: badam(head='always')",
                after[0],
            )
        return _Turns(
            self,
            run,
            blocks=self.blocks(run.facts),
            every=self.every,
            parked=self.parked,
            always=after if self.head == "always" else None,
        )


def _outside(facts: Facts) -> tuple[list[str], list[str]]:
    """Trainable parameters that lie before the first layer, and those after it."""
    before: list[str] = []
    after: list[str] = []
    found = before
    for name, parameter in facts.model.named_parameters():
        if facts.structure.layer_of(name) is not None:
            found = after
        elif parameter.requires_grad:
            found.append(name)
    return before, after


class _Turns(RotatingSet):
    settings: Badam

    def _draw(self, interval: int) -> list[int]:
        """One block; a round is a permutation of all."""
        turn, position = divmod(interval, len(self._blocks))
        order = list(range(len(self._blocks)))
        if self.settings.order == "random":
            random.Random(f"{self.settings.seed}:{turn}").shuffle(order)
        elif self.settings.order == "descending":
            order.reverse()
        return [order[position]]
