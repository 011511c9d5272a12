"""Optimizer state that follows the active set: dropped, parked in another place, brought back.

What a projection keeps (a basis, a norm) goes with the moments that are in its space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt.profiling.accounts import Account, Place

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from memrt.observer import Observer
    from memrt.places import Mover

__all__ = ["OptimizerState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parked:
    """The state of one parameter that does not train now."""

    place: Place
    state: Mapping[str, Any]
    on_host: frozenset[str] = frozenset()
    """What lies on the host while the parameter trains too: step counters that are read there."""


class OptimizerState:
    """The state of one optimizer's parameters, and where the state of the others waits."""

    def __init__(self, mover: Mover, observer: Observer) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        self.projections: dict[nn.Parameter, Any] = {}
        self._mover = mover
        self._observer = observer
        self._parked: dict[str, _Parked] = {}

    def release(self, name: str, parameter: nn.Parameter, park: Place | None) -> None:
        """Take away the state of a parameter that stops training; keep it in `park` if named."""
        state = self.optimizer.state.pop(parameter, None) if self.optimizer is not None else None
        if park is None:
            if parameter in self.projections:
                self.projections[parameter].forget()
            return
        projection = self.projections.get(parameter)
        if state or (projection is not None and projection.tensors()):
            self._relocate_projection(parameter, park)
            apart = [key for key, value in (state or {}).items() if _lies_apart(value, parameter)]
            on_host = self._on_host(parameter, otherwise=apart)
            moved = self._moved(state or {}, park, on_host)
            self._parked[name] = _Parked(place=park, state=moved, on_host=on_host)

    def restore(self, name: str, parameter: nn.Parameter) -> None:
        """Bring back the parked state of a parameter that trains again, if there is any."""
        parked = self._parked.pop(name, None)
        if parked is None:
            return
        self._relocate_projection(parameter, Place.DEVICE)
        if parked.state and self.optimizer is not None:
            # on the CPU what is made lies beside its parameter, and so does what returns
            on_host = frozenset() if parameter.device.type == "cpu" else parked.on_host
            state = self._moved(parked.state, Place.DEVICE, on_host)
            self.optimizer.state[parameter] = state

    def _on_host(self, parameter: nn.Parameter, *, otherwise: Iterable[str]) -> frozenset[str]:
        """What memrt's optimizers keep there, whatever device a state was written on."""
        told = getattr(self.optimizer, "state_on_host", None)
        return frozenset(otherwise if told is None else told(parameter))

    def _relocate_projection(self, parameter: nn.Parameter, place: Place) -> None:
        if parameter in self.projections:
            self.projections[parameter].relocate(lambda tensor: self._copy(tensor, place))

    def _copy(self, tensor: Tensor, place: Place) -> Tensor:
        copy = self._mover.move(tensor, place)
        self._observer.tag(copy, Account.OPTIMIZER, owner="optimizer")
        return copy

    def _moved(
        self, state: Mapping[str, Any], place: Place, on_host: Collection[str]
    ) -> dict[str, Any]:
        """Copies in `place`; on the device's side what belongs `on_host` goes no farther."""

        def target(key: str) -> Place:
            return Place.HOST if place is Place.DEVICE and key in on_host else place

        return {
            key: self._copy(value, target(key)) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }

    def forget_parked(self) -> None:
        """Drop what is parked, before another run's is loaded."""
        self._parked = {}

    def parked_state(self) -> dict[str, Any]:
        """What is parked, by parameter name, as plain tensors. Projections save their own."""
        return {
            name: {
                "place": parked.place.value,
                "state": dict(parked.state),
                "on_host": sorted(parked.on_host),
            }
            for name, parked in self._parked.items()
        }

    def load_parked_state(
        self, parked: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Park what `parked_state` returned, each in its place, and projections that are loaded."""
        self._parked = {}
        for name, entry in parked.items():
            place, parameter = Place(entry["place"]), parameters[name]
            on_host = self._on_host(parameter, otherwise=entry.get("on_host", ()))
            self._relocate_projection(parameter, place)
            self._parked[name] = _Parked(
                place=place, state=self._moved(entry["state"], place, on_host), on_host=on_host
            )


def _lies_apart(value: Any, parameter: Tensor) -> bool:
    """On the host, of a parameter that is not."""
    return (
        isinstance(value, Tensor) and value.device.type == "cpu" and parameter.device.type != "cpu"
    )
