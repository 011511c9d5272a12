"""How the side's hidden channels come from the backbone's: some of them, or directions among them.

    Selection      channel j of the side is channel c_j of the backbone
    Projection     S = Uᵀ H: a weight W that writes the hidden state becomes Uᵀ W, one that reads it
                   W R, with R S the best guess of H

The directions are found on data (`memrt.ladder.principal`), with R = U, or are those of pooling:
`reduction` neighbouring channels each, with equal weights. Those need no data, with R = U and 1 /
reduction of what lies in no direction more than in others. Hidden states lie in some more than in
others, and with their second moments M the least squares of H on S are

    R = M U (Uᵀ M U)⁻¹

All-MiniLM-L6-v2 on SST-2, sums of two: with R = U .51 of the squared length of a hidden state is
unknown, with the least squares .25; as many principal directions leave .13.

A norm multiplies the channels of a state of length √channels by its weight γ. Selected channels
keep theirs. In directions that becomes a matrix, Uᵀ diag(γ) R, of which the side's norm can hold
the diagonal; and √side is not the length that Uᵀ of a normed state has, √(energy · hidden), so that
the diagonal is multiplied by the quotient of both. With equal γ, and all directions, that is exact
for RMSNorm: it commutes with rotations (SliceGPT, arXiv 2401.15024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Narrowing", "Projection", "Selection"]

RIDGE = 1e-4
"""Of the mean of the diagonal: what guesses may amplify is bounded where sums repeat others."""


class Narrowing(Protocol):
    """From [hidden] to [side]."""

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """A weight or bias with this axis of hidden channels made narrow."""

    def of_norm(self, norm: nn.Module, leaf: str) -> Tensor:
        """The weight or bias of the side's norm for a norm, or a scale, over hidden channels."""

    def matrix(self, hidden: int) -> Tensor:
        """[hidden, side]: what a hidden state is multiplied with."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Some of the channels, by index [side]."""

    channels: Tensor

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """The kept rows or columns."""
        return tensor.index_select(axis, self.channels)

    def of_norm(self, norm: nn.Module, leaf: str) -> Tensor:
        """The kept elements."""
        return norm.get_parameter(leaf).detach().index_select(0, self.channels)

    def matrix(self, hidden: int) -> Tensor:
        """One 1 a column."""
        made = torch.zeros(
            hidden, len(self.channels), dtype=torch.float32, device=self.channels.device
        )
        return made.scatter_(0, self.channels[None, :], 1.0)


@dataclass(frozen=True, slots=True)
class Projection:
    """Directions among the channels."""

    basis: Tensor
    """U [hidden, side], fp32, orthonormal columns."""
    energy: Tensor
    """0-dim: the share of a hidden state's squared length that lies in them."""
    reading: Tensor
    """R [hidden, side], fp32."""

    @classmethod
    def pooling(
        cls, hidden: int, side: int, *, device: torch.device, moments: Tensor | None = None
    ) -> Projection:
        """Sums of hidden / side neighbouring channels, each of length 1.

        `moments`: M [hidden, hidden], or None for as much in every direction.
        """
        reduction = hidden // side
        basis = torch.eye(side, dtype=torch.float32, device=device).repeat_interleave(
            reduction, dim=0
        )
        basis /= reduction**0.5
        if moments is None:
            share = torch.tensor(side / hidden, dtype=torch.float32, device=device)
            return cls(basis=basis, energy=share, reading=basis)
        wide = basis.double()
        joint = moments.double() @ wide  # [hidden, side]
        own = wide.t() @ joint
        energy = own.trace() / moments.trace()
        own.diagonal().add_(RIDGE * own.trace() / side)
        reading = torch.linalg.solve(own, joint.t()).t()
        return cls(basis=basis, energy=energy.float(), reading=reading.float().contiguous())

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """The product with U of what is written (axis 0), with R of what is read (1), in fp32."""
        if axis == 0:
            return self.basis.to(tensor.device).t() @ tensor.float()
        return tensor.float() @ self.reading.to(tensor.device)

    def of_norm(self, norm: nn.Module, leaf: str) -> Tensor:
        """The diagonal of Uᵀ diag(γ) R, lengthened unless it only scales; of a bias Uᵀ β."""
        vector = norm.get_parameter(leaf).detach()
        if leaf == "bias":
            return self.along(vector, 0)
        product = (self.basis * self.reading).t().to(vector.device)  # [side, hidden]
        if "norm" not in type(norm).__name__.lower():  # of DINOv2, on what a branch gives
            return product @ vector.float()
        unit = _unit(norm)
        side, hidden = product.shape
        gain = (self.energy.to(vector.device) * (hidden / side)).sqrt()
        return gain * (product @ (vector.float() + unit)) - unit

    def matrix(self, hidden: int) -> Tensor:
        """U."""
        return self.basis


def _unit(norm: nn.Module) -> Tensor:
    """0-dim: 1 where a norm multiplies by 1 + weight (Gemma), 0 where by its weight."""
    weight = norm.get_parameter("weight").detach()
    signs = torch.ones_like(weight)
    signs[::2] = -1.0
    with torch.no_grad():
        output = norm(signs)
    bias = getattr(norm, "bias", None)
    if isinstance(bias, Tensor):
        output = output - bias
    unit: Tensor = (output / signs - weight).float().mean().round()
    return unit
