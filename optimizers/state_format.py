"""What a state format is: a layout of plain tensors, and one AdamW step on it.

A format decides in which tensors the two moments of a parameter wait between two steps. A step
turns them into fp32, updates in fp32 whatever the parameter's dtype, and keeps them again. bf16
parameters are rounded stochastically where an update brings a rounding key
(`memrt.kernels.stochastic_rounding`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

__all__ = ["AdamWSettings", "StateFormat", "StateTensor", "Update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """The numbers of one step of one parameter group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class StateTensor(NamedTuple):
    """What one tensor of a state must look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool = False


class Update(NamedTuple):
    """One parameter's share of a step: updated in place, parameter and state."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    rounding_key: tuple[int, int] | None = None
    """Rounds a bf16 parameter stochastically; without it, to the nearest."""


class StateFormat(ABC):
    """How moments are kept. One object serves all parameters of an optimizer."""

    name: ClassVar[str]
    min_elements: ClassVar[int] = 0
    """Smaller parameters keep float32 state."""

    @abstractmethod
    def layout(self, shape: Sequence[int]) -> dict[str, StateTensor]:
        """The tensors that the state of moments of this shape is made of."""

    @abstractmethod
    def adamw(self, updates: Sequence[Update], settings: AdamWSettings) -> None:
        """One AdamW step on each of them."""

    def create(self, shape: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The state before the first step: zeros."""
        return {
            key: torch.zeros(
                tensor.shape, dtype=tensor.dtype, device="cpu" if tensor.on_host else device
            )
            for key, tensor in self.layout(shape).items()
        }

    def check(self, state: Mapping[str, Tensor], shape: Sequence[int], *, owner: str) -> None:
        """Refuse a state that is not this format's for moments of this shape."""
        layout = self.layout(shape)
        if state.keys() != layout.keys():
            raise ValueError(
                f"the state of {owner} holds {sorted(state)}, expected {sorted(layout)}; use the "
                "state format and the projections that it was made with"
            )
        for key, expected in layout.items():
            tensor = state[key]
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise ValueError(
                    f"{key} of {owner} is {tuple(tensor.shape)} {tensor.dtype}, expected "
                    f"{expected.shape} {expected.dtype}; use the state of the same model and "
                    "projections"
                )

    def load(
        self,
        state: Mapping[str, Tensor],
        shape: Sequence[int],
        device: torch.device,
        *,
        owner: str,
    ) -> dict[str, Tensor]:
        """A saved state, checked, in its own dtypes, where this format keeps it."""
        self.check(state, shape, owner=owner)
        return {
            key: state[key].to("cpu" if tensor.on_host else device)
            for key, tensor in self.layout(shape).items()
        }

    def state_bytes(self, shape: Sequence[int]) -> int:
        """The bytes of one parameter's state."""
        return sum(prod(t.shape) * t.dtype.itemsize for t in self.layout(shape).values())

    def shared_tensors(self) -> list[Tensor]:
        """Tensors that exist once, beside the parameters' states."""
        return []
