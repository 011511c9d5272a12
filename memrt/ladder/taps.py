"""What a rung begins with: a tap that brings a hidden state down, and the gate that mixes it in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from memrt.kernels.ladder import ladder_down, ladder_mix
from memrt.kernels.mixed_precision import product_dtype
from memrt.ladder.narrowing import Narrowing

__all__ = ["Gate", "Tap", "make_tap"]

LOW_RANK = 16
"""Width of the bottleneck of a low-rank tap (QST's)."""

GATE_TEMPERATURE = 0.1
"""Of the scalar gate (LST's): the gate moves ten times as fast as its parameter."""


class Tap(nn.Module):
    """Brings a hidden state [..., hidden] down to [..., side] and mixes it into the state."""

    def forward(
        self, hidden: Tensor, state: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """The mixed state; without one, the hidden state brought down."""
        down = self.down(hidden)
        return down if state is None or gate is None else ladder_mix(down, state, gate)

    def down(self, hidden: Tensor) -> Tensor:
        """The hidden state at the side's width."""
        raise NotImplementedError

    def begin(self, narrowing: Narrowing) -> None:
        """Start as the narrowing that the side's weights were made with, where the tap can."""


class LinearTap(Tap):
    """A learned projection (LST). Keeps the hidden state for its weight's gradient."""

    def __init__(self, hidden: int, side: int, *, kept: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(side, hidden).normal_(std=0.01))
        self.bias = nn.Parameter(torch.zeros(side))
        self.kept = kept

    def forward(
        self, hidden: Tensor, state: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """One operator reads the hidden state once."""
        return ladder_down(hidden, self.weight, self.bias, state, gate, kept=self.kept)

    def begin(self, narrowing: Narrowing) -> None:
        """Start as the narrowing, exactly."""
        with torch.no_grad():
            self.weight.copy_(narrowing.matrix(self.weight.shape[1]).t())


class LowRankTap(Tap):
    """LayerNorm(B silu(A h)) with a bottleneck of 16 (QST). Keeps the hidden state for A."""

    def __init__(self, hidden: int, side: int, *, kept: str) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(LOW_RANK, hidden))
        self.b = nn.Linear(LOW_RANK, side, bias=False)
        self.norm = nn.LayerNorm(side)
        self.kept = kept
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        nn.init.kaiming_uniform_(self.b.weight, a=5**0.5)

    def down(self, hidden: Tensor) -> Tensor:
        """Through the bottleneck."""
        narrow = nn.functional.silu(ladder_down(hidden, self.a, None, kept=self.kept))
        result: Tensor = self.norm(self.b(narrow))
        return result


class PooledTap(Tap):
    """Sums of r neighbouring channels over √r, as long as they. Nothing to learn, nothing kept."""

    def __init__(self, hidden: int, side: int) -> None:
        super().__init__()
        self.reduction = hidden // side

    def down(self, hidden: Tensor) -> Tensor:
        """Sums of groups of channels, which the side's weights were made for."""
        groups = hidden.detach().view(*hidden.shape[:-1], -1, self.reduction)
        return groups.sum(-1) / math.sqrt(self.reduction)


class ProjectedTap(Tap):
    """A fixed projection onto the directions of the side's weights. Nothing to learn or to keep."""

    basis: Tensor

    def __init__(self, hidden: int, side: int) -> None:
        super().__init__()
        drawn = torch.empty(hidden, side, dtype=torch.float32).normal_()
        self.register_buffer("basis", torch.linalg.qr(drawn).Q.to(torch.get_default_dtype()))

    def down(self, hidden: Tensor) -> Tensor:
        """The product with the basis [hidden, side]."""
        dtype = product_dtype(hidden)
        return hidden.detach().to(dtype) @ self.basis.to(dtype)

    def begin(self, narrowing: Narrowing) -> None:
        """Project as the side's weights were."""
        self.basis.copy_(narrowing.matrix(self.basis.shape[0]))


class SharedTap(Tap):
    """Another tap's projection: one basis serves all layers, and lies in memory once."""

    def __init__(self, first: ProjectedTap) -> None:
        super().__init__()
        self._first = (first,)  # in a tuple: no child, or its basis would be saved twice

    def down(self, hidden: Tensor) -> Tensor:
        """The product with the other's basis."""
        return self._first[0].down(hidden)


def make_tap(kind: str, hidden: int, side: int, *, kept: str, first: Tap | None = None) -> Tap:
    """A tap by its name; `first` is the one that the stack has already."""
    if isinstance(first, ProjectedTap):
        return SharedTap(first)
    if kind == "linear":
        return LinearTap(hidden, side, kept=kept)
    if kind == "low_rank":
        return LowRankTap(hidden, side, kept=kept)
    return PooledTap(hidden, side) if kind == "pooled" else ProjectedTap(hidden, side)


class Gate(nn.Module):
    """How much of its state the side keeps: one learned number a rung, or one a channel. fp32."""

    def __init__(self, kind: str, side: int) -> None:
        super().__init__()
        scalar = kind == "scalar"
        start = torch.zeros(1) if scalar else torch.full((side,), 0.5)
        self.parameter = nn.Parameter(start.float())
        self.temperature = GATE_TEMPERATURE if scalar else 1.0

    def forward(self) -> Tensor:
        """The gate, [1] or [side], in (0, 1)."""
        return torch.sigmoid(self.parameter / self.temperature)
