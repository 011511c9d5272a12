"""Optimizer state that follows the active set: dropped, parked in another place, brought back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt.profiling.accounts import Account, Place

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memrt.observer import Observer
    from memrt.places import Mover

__all__ = ["OptimizerState"]


class OptimizerState:
    """The state of one optimizer's parameters, and where the state of the others waits."""

    def __init__(self, mover: Mover, observer: Observer) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        self.projections: dict[nn.Parameter, Any] = {}
        self._mover = mover
        self._observer = observer
        self._parked: dict[str, tuple[Place, dict[str, Any]]] = {}

    def release(self, name: str, parameter: nn.Parameter, park: Place | None) -> None:
        """Take away the state of a parameter that stops training; keep it in `park` if named."""
        state = self.optimizer.state.pop(parameter, None) if self.optimizer is not None else None
        if park is None:
            if parameter in self.projections:
                self.projections[parameter].forget()
        elif state:
            self._parked[name] = (park, self._moved(state, park))

    def restore(self, name: str, parameter: nn.Parameter) -> None:
        """Bring back the parked state of a parameter that trains again, if there is any."""
        _, state = self._parked.pop(name, (None, None))
        if state is not None and self.optimizer is not None:
            self.optimizer.state[parameter] = self._moved(state, Place.DEVICE)

    def _moved(self, state: Mapping[str, Any], place: Place | str) -> dict[str, Any]:
        moved = {
            key: self._mover.move(value, place) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }
        for value in moved.values():
            if isinstance(value, Tensor):
                self._observer.tag(value, Account.OPTIMIZER, owner="optimizer")
        return moved

    def forget_parked(self) -> None:
        """Drop what is parked, before another run's is loaded."""
        self._parked = {}

    def parked_state(self) -> dict[str, Any]:
        """What is parked, by parameter name, as plain tensors."""
        return {
            name: {"place": place.value, "state": dict(state)}
            for name, (place, state) in self._parked.items()
        }

    def load_parked_state(self, parked: Mapping[str, Any]) -> None:
        """Park what `parked_state` returned, each in its place."""
        self._parked = {
            name: (Place(entry["place"]), self._moved(entry["state"], entry["place"]))
            for name, entry in parked.items()
        }
