"""The leading subspace of a formed gradient: GaLore as it was published.

For a weight [m, n] with s = min(m, n): P [s, r] holds the leading singular vectors of G on the
smaller side, found every ``every`` steps,

    R = Pᵀ G (m < n) or G P,     W <- W - lr · scale · P N  (or N Pᵀ)

``solver`` says how they are found. "svd": the exact thin SVD of G, in fp32, with the signs that it
gives: what the authors do. "gram": the eigenvectors of G Gᵀ [s, s] (Gᵀ G), the same space at a
fraction of the time, with signs aligned to the old basis.

Bytes: the basis, 4 · s · r. Workspace of a refresh: "svd" 4 · (2 m n + s² + s n) (G is copied to be
fp32 and finite); "gram" 4 · 4 s² and a bounded piece of G. Otherwise that of ``formed_gradient``
and, for narrow weights on the CPU, of ``projected_update``.

Source: Zhao et al., GaLore (arXiv 2403.03507).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from memrt.kernels.formed_gradient import gram
from memrt.kernels.projected_update import ScaledAddend, projected_update_
from memrt.kernels.stochastic_rounding import Rounding
from memrt.optimizers.basis import BasisFormat, MovingBasis
from memrt.optimizers.formed_projection import FormedProjection

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FormedSubspace", "leading_vectors"]

Solver = Literal["svd", "gram"]


def leading_vectors(
    gradient: Tensor, rank: int, *, solver: Solver, left: bool
) -> tuple[Tensor, Tensor]:
    """Return the leading singular vectors [s, rank] of the smaller side, and whether to use them.

    The second is a 0-dim bool, False where the gradient is zero or not finite.
    """
    if solver == "gram":
        energies, sound = gram(gradient, left=left)
        vectors = torch.linalg.eigh(energies).eigenvectors  # by rising energy
        return vectors.flip(1)[:, :rank], sound
    magnitude = torch.linalg.vector_norm(gradient, ord=float("inf"))
    sound = torch.isfinite(magnitude) & (magnitude > 0.0)
    # the solver raises on numbers that are not finite
    u, _, vh = torch.linalg.svd(torch.where(sound, gradient.float(), 0.0), full_matrices=False)
    return (u[:, :rank] if left else vh[:rank].t()), sound


class FormedSubspace(FormedProjection):
    """The basis of one weight whose gradient is formed: GaLore's projection and its lift.

    In every optimizer step: ``begin_step``, then the optimizer's ``receive`` and ``apply``.
    ``offset`` staggers the refreshes of many weights.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int,
        every: int,
        offset: int = 0,
        scale: float = 1.0,
        solver: Solver = "gram",
        basis: BasisFormat = "float32",
        lazy: float | None = None,
        rotates: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= rank < min(shape):
            raise ValueError(
                f"rank is {rank} for a weight {shape}: give 1 to {min(shape) - 1}, or no projection"
            )
        if not scale > 0.0:
            raise ValueError(f"scale is {scale}: give a positive number")
        if solver not in ("svd", "gram"):
            raise ValueError(f"solver is {solver!r}: give 'svd' or 'gram'")
        super().__init__(shape)
        self._basis = MovingBasis(
            min(shape),
            rank,
            every=every,
            offset=offset,
            lazy=lazy,
            format=basis,
            align=solver == "gram",
            rotates=rotates,
            device=device,
        )
        self._scale, self._solver = scale, solver

    @property
    def rank(self) -> int:
        """Of the basis."""
        return self._basis.rank

    @property
    def refresh_count(self) -> int:
        """How often the basis was found."""
        return self._basis.refresh_count

    def begin_step(self, step: int) -> None:
        """Decide whether the next gradient refreshes the basis, at optimizer step ``step`` >= 0."""
        self.clear()  # a step that was begun and given up
        self._basis.begin_step(step)

    def set_basis(self, basis: Tensor, *, frozen: bool = True) -> None:
        """Put in a basis [s, k], which sets the rank to k; frozen, it is never refreshed."""
        self._basis.set(basis, frozen=frozen)

    def take_rotation(self) -> Tensor | None:
        """P_newᵀ P_old of this step's refresh, once, where the moments are to follow it."""
        return self._basis.take_rotation()

    def _projector(self, gradient: Tensor) -> Tensor:
        if self._basis.pending:
            found, sound = leading_vectors(
                gradient, self.rank, solver=self._solver, left=self.is_left
            )
            self._basis.move(
                found,
                sound,
                fallback=lambda: torch.eye(*found.shape, dtype=torch.float32, device=found.device),
            )
        projector = self._basis.matrix()
        if projector is None:
            raise RuntimeError("there is no basis yet: call begin_step() before the step")
        return projector

    def _update(
        self,
        weight: Tensor,
        direction: Tensor,
        *,
        formed: Tensor,
        gradient: Tensor,
        lr: float,
        correction: Tensor | float,
        decay: float,
        rounding: Rounding | None,
    ) -> None:
        alpha = -lr * self._scale
        self._lift(weight, direction, alpha=alpha, decay=decay, rounding=rounding)

    def _lift(
        self,
        weight: Tensor,
        direction: Tensor,
        *,
        alpha: float,
        decay: float,
        rounding: Rounding | None,
        addend: ScaledAddend | None = None,
    ) -> None:
        basis = self._basis.matrix()
        assert basis is not None
        left, right = (basis, direction) if self.is_left else (direction, basis.t())
        projected_update_(
            weight, left, right, alpha=alpha, decay=decay, addend=addend, rounding=rounding
        )

    def forget(self) -> None:
        """Free the basis, as when the weight stops training; its next gradient finds one."""
        self.clear()
        self._basis.forget()

    def relocate(self, move: Callable[[Tensor], Tensor]) -> None:
        """Keep the basis in another place: `move` gives a copy there."""
        self.clear()
        self._basis.relocate(move)

    def tensors(self) -> dict[str, Tensor]:
        """What is held between two steps: the basis."""
        return self._basis.tensors()

    def state_dict(self) -> dict[str, Any]:
        """The basis and its schedule."""
        return self._basis.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of the subspace that gave ``state``, between two steps."""
        self._basis.load_state_dict(state)
        self.clear()
