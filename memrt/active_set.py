"""What strategies that train other parameters every few steps share: intervals, blocks, parking.

Optimizer steps are counted in intervals of `every`. At the start of an interval the strategy says
which blocks train in it (`_draw`), and `run.activate` makes it so: what leaves loses its gradient,
and its optimizer state is freed or waits in a place; what comes back from there goes on with it.
Nothing below the lowest block that trains is run backwards, for autograd stops where no input and
no parameter wants a gradient.

The optimizer is memrt's AdamW, in fp32 with the bits of torch's: a step with gradients that are
not finite is skipped and counted, and state is 8 bytes a parameter whatever its dtype. torch's
would keep moments in a weight's own, and bf16 forgets beside 0.999. bf16 is rounded stochastically.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memrt.optimizer_slots import composed_adamw
from memrt.strategy import Attachment, Rule, Strategy

if TYPE_CHECKING:
    from memrt.session import Session
    from memrt.structure import Facts

__all__ = [
    "PARKED",
    "RotatingSet",
    "check_rotation",
    "refuse_idle_rounding",
    "trainable_by_layer",
]

PARKED = ("no", "host", "disk")
"""Where the optimizer state of what leaves goes; `"no"` frees it."""


def check_rotation(*, every: int, parked: str) -> None:
    """Refuse an interval or a parking place that cannot be."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every={every!r}: must be a whole number, 1 or more")
    if parked not in PARKED:
        raise ValueError(f"parked={parked!r}: use one of {', '.join(PARKED)}")


def refuse_idle_rounding(facts: Facts) -> None:
    """Refuse `stochastic_rounding=False` where nothing would be rounded stochastically."""
    if facts.settings.stochastic_rounding:
        return
    if facts.settings.optimizer != "adamw":
        raise ValueError(
            f"stochastic_rounding=False has no effect with optimizer={facts.settings.optimizer!r}, "
            "which rounds as it does; leave it out"
        )
    if not any(parameter.dtype is torch.bfloat16 for _, parameter in facts.parameters()):
        raise ValueError(
            "stochastic_rounding=False has no effect: no parameter that trains is bf16; leave it "
            "out"
        )


def trainable_by_layer(facts: Facts) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the trainable parameters of every layer that has some, and of those outside."""
    layers: dict[str, list[str]] = {}
    outside: list[str] = []
    for name, _ in facts.parameters():
        layer = facts.structure.layer_of(name)
        (outside if layer is None else layers.setdefault(layer, [])).append(name)
    return layers, outside


class RotatingSet(Attachment):
    """Trains the blocks that `_draw` names for an interval, and `always` with them.

    Blocks are lists of parameter names. A draw is a function of the interval alone, so that every
    rank and every resumed run draws alike.
    """

    def __init__(
        self,
        settings: Strategy,
        run: Session,
        *,
        blocks: list[list[str]],
        every: int,
        parked: str,
        always: list[str] | None = None,
    ) -> None:
        super().__init__(settings, run)
        self.active: list[int] = []
        self._blocks = blocks
        self._every = every
        self._park = None if parked == "no" else parked
        self._always = always or []

    def rules(self) -> list[Rule]:
        """Asks for memrt's AdamW, unless the optimizer is the user's."""
        return composed_adamw(self.run)

    def _draw(self, interval: int) -> list[int]:
        """The blocks of an interval, by their index."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Draw at the start of every interval."""
        if step % self._every == 0:
            self._activate(self._draw(step // self._every))

    def _activate(self, active: list[int]) -> None:
        self.active = active
        names = [*self._always, *(name for index in active for name in self._blocks[index])]
        # what leaves goes first: else its state and a parked one that returns would meet
        self.run.activate(filter(self._trains, names), park=self._park)
        self.run.activate(names, park=self._park)

    def _trains(self, name: str) -> bool:
        return self.run.model.get_parameter(name).requires_grad

    def state_dict(self) -> dict[str, Any]:
        """The active blocks, by their index."""
        return {"active": list(self.active)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of an interval."""
        if state["active"]:
            self._activate([int(index) for index in state["active"]])
