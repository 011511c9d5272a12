"""A low-rank subspace of one weight's gradient, filled without ever forming that gradient.

For a weight [m, n] with dW = rowsᵀ @ columns, rows [tokens, m] and columns [tokens, n], and a
basis of rank r on the smaller side:

    m < n    left:   P [m, r],  R = Pᵀ dW = (rows P)ᵀ columns  [r, n],  lift(N) = P N
    else     right:  P [n, r],  R = dW P = rowsᵀ (columns P)   [m, r],  lift(N) = N Pᵀ

R is linear in dW, so summing it over the micro-batches of a step is exact. Every ``every`` steps
the basis is found anew, from the first micro-batch of the step that has a gradient and before its
R: by randomized subspace iteration, started from the old basis. Its columns get the signs that make
diag(P_newᵀ P_old) >= 0, for the moments are kept.

Bytes, with s = min(m, n) and l = max(m, n): the basis, s · r · 4 (or less: ``basis.py``), and R,
l · r · 4, from a step's first gradient until ``clear()``; dW would be m · n · 4 (or 2). Workspace:
that of ``memrt.optimizers.range_finder`` at a refresh, with k = r + 8, of ``gradient_products``
and of ``projected_update``.

Source: Zhao et al., GaLore (arXiv 2403.03507), with the products reordered. For its exact SVD come
iterations that capture .998 of the energy where singular values are i^-1/2, more where they fall
faster (128 × 200, r = 16: 3 from nothing; 2 from an old basis .997; CPU, torch 2.13).
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from memrt.kernels.gradient_products import add_gradient_times_, gradient_squared_norm
from memrt.kernels.projected_update import projected_update_
from memrt.kernels.stochastic_rounding import Rounding
from memrt.optimizers.basis import BasisFormat, MovingBasis
from memrt.optimizers.range_finder import leading_basis

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Subspace"]

_OVERSAMPLE = 8  # columns beyond the rank while a basis is sought, as Halko et al. advise (5 to 10)
_FIRST_ITERATIONS = 3
_REFRESH_ITERATIONS = 2


class Subspace:
    """The basis and the projected gradient of one weight: a gradient sink and a projection.

    In every optimizer step: ``begin_step``, one ``accumulate`` for every micro-batch, ``apply`` and
    ``clear``. ``offset`` staggers the refreshes of many weights: steps are counted from 0, step 0
    finds every basis, and later ones are due at each step > 0 with (step - offset) % every == 0.

    ``norm`` says what ``squared_norm`` means: ‖R‖², which is at most ‖dW‖², or "exact" ‖dW‖², which
    exists for a single ``accumulate`` in a step, for the norm of a sum needs cross terms.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int,
        every: int,
        offset: int = 0,
        scale: float = 1.0,
        norm: Literal["projected", "exact"] = "projected",
        basis: BasisFormat = "float32",
        lazy: float | None = None,
        rotates: bool = False,
        seed: int = 0,
        index: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= rank < min(shape):
            raise ValueError(
                f"rank is {rank} for a weight {shape}: give 1 to {min(shape) - 1}, or no projection"
            )
        if not scale > 0.0:
            raise ValueError(f"scale is {scale}: give a positive number")
        if norm not in ("projected", "exact"):
            raise ValueError(f"norm is {norm!r}: give 'projected' or 'exact'")
        self.weight_shape = (shape[0], shape[1])
        self.side: Literal["left", "right"] = "left" if shape[0] < shape[1] else "right"
        self._basis = MovingBasis(
            min(shape),
            rank,
            every=every,
            offset=offset,
            lazy=lazy,
            format=basis,
            rotates=rotates,
            device=device,
        )
        self._scale, self._norm = scale, norm
        self._seed, self._index, self._device = seed, index, torch.device(device)
        self._gradient: Tensor | None = None  # of self.shape
        self._exact_squared_norm: Tensor | None = None
        self._is_settled = False
        """Whether the step's gradient is in its basis; zero or not finite, it is so in any."""

    @property
    def rank(self) -> int:
        """Of the basis."""
        return self._basis.rank

    @property
    def refresh_count(self) -> int:
        """How often the basis was found."""
        return self._basis.refresh_count

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the projected gradient, and so of the moments."""
        rows, columns = self.weight_shape
        return (self.rank, columns) if self.side == "left" else (rows, self.rank)

    def begin_step(self, step: int) -> None:
        """Decide whether the next gradient refreshes the basis, at optimizer step ``step`` >= 0.

        A refresh that found no gradient but zero or infinite ones is made up for at the next.
        """
        if self._gradient is not None:
            raise RuntimeError(f"step {step} begins before the last one was cleared: call clear()")
        self._basis.begin_step(step)

    def request_refresh(self) -> None:
        """Refresh at the next step's first gradient, as after a step skipped for infinities."""
        self._basis.request_refresh()

    @torch.no_grad()
    def accumulate(self, rows: Tensor, columns: Tensor) -> None:
        """Project rowsᵀ @ columns and add it up, for rows [tokens, m], columns [tokens, n]."""
        given = (rows.shape[1], columns.shape[1])
        if given != self.weight_shape or rows.shape[0] != columns.shape[0]:
            raise ValueError(
                f"rows are {tuple(rows.shape)} and columns {tuple(columns.shape)}: "
                f"give [tokens, m] and [tokens, n] of a weight {self.weight_shape}"
            )
        if self._norm == "exact" and self._gradient is not None:
            raise RuntimeError(
                "the exact norm of a gradient that is never formed needs a single micro-batch and "
                "a layer that runs once in it, and this one ran again (in another micro-batch, or "
                "in one forward, as shared layers do): use norm='projected', the default, or one "
                "micro-batch a step where no layer runs twice in it"
            )
        small, large = (rows, columns) if self.side == "left" else (columns, rows)
        with torch.autocast(rows.device.type, enabled=False):
            if self._basis.pending and not self._is_settled:
                self._refresh(small, large)
            basis = self._basis.matrix()
            if basis is None:
                raise RuntimeError("there is no basis yet: call begin_step() before backward")
            self._is_settled = self._is_settled or not self._basis.pending
            if self._norm == "exact":
                self._exact_squared_norm = gradient_squared_norm(rows, columns)
            if self._gradient is None:
                self._gradient = torch.zeros(self.shape, dtype=torch.float32, device=self._device)
            total = self._gradient.t() if self.side == "left" else self._gradient  # [l, rank]
            add_gradient_times_(total, large, small, basis)

    def _refresh(self, small: Tensor, large: Tensor) -> None:
        """Find the basis of the gradient smallᵀ @ large, or keep the old one if it has none."""
        old = self._basis.found()
        start = self._start_block(old)
        iterations = _FIRST_ITERATIONS if old is None else _REFRESH_ITERATIONS
        found, sound = leading_basis(
            small, large, start=start, rank=self.rank, iterations=iterations
        )
        self._basis.move(
            found, sound, fallback=lambda: torch.linalg.qr(start).Q[:, : self.rank].contiguous()
        )

    def _start_block(self, old: Tensor | None) -> Tensor:
        """Return [s, k]: the old basis, then random columns that depend on nothing else."""
        size = min(self.weight_shape)
        fixed = 0 if old is None else self.rank
        num_random = min(self.rank + _OVERSAMPLE, size) - fixed
        key = f"{self._seed},{self._index},{self.refresh_count}".encode()
        generator = torch.Generator(device=self._device)
        generator.manual_seed(int.from_bytes(blake2b(key, digest_size=8).digest(), "big"))
        noise = torch.randn(
            size, num_random, generator=generator, dtype=torch.float32, device=self._device
        )
        return noise if old is None else torch.cat([old, noise], dim=1)

    def gradient(self) -> Tensor | None:
        """The projected gradient (fp32), summed over the step; None if nothing arrived."""
        return self._gradient

    def take_rotation(self) -> Tensor | None:
        """P_newᵀ P_old of this step's refresh, once, where the moments are to follow it."""
        return self._basis.take_rotation()

    def squared_norm(self) -> Tensor:
        """Return ‖R‖², or with "exact" ‖dW‖², as a 0-dim fp32 tensor; zero if nothing arrived."""
        if self._gradient is None:
            return torch.zeros((), dtype=torch.float32, device=self._device)
        if self._exact_squared_norm is not None:
            return self._exact_squared_norm.clone()
        norm: Tensor = torch.linalg.vector_norm(self._gradient)
        return norm.square()

    def scale_gradient_(self, factor: Tensor | float) -> None:
        """Multiply the step's gradient, and with it its norm, by ``factor`` (clipping)."""
        if self._gradient is not None:
            self._gradient.mul_(factor)
        if self._exact_squared_norm is not None:
            self._exact_squared_norm.mul_(factor).mul_(factor)

    def clear(self) -> None:
        """Free the gradient after the step: the basis alone is kept."""
        self._gradient = self._exact_squared_norm = None
        self._is_settled = False

    def forget(self) -> None:
        """Free the basis too, as when the weight stops training; its next gradient finds one."""
        self.clear()
        self._basis.forget()

    def relocate(self, move: Callable[[Tensor], Tensor]) -> None:
        """Keep the basis in another place: `move` gives a copy there. No gradient is kept."""
        self.clear()
        self._basis.relocate(move)

    @torch.no_grad()
    def apply(
        self,
        weight: Tensor,
        direction: Tensor,
        *,
        lr: float,
        decay: float = 1.0,
        rounding: Rounding | None = None,
    ) -> None:
        """In place: weight <- decay * weight - lr * scale * lift(direction), rounded once.

        ``rounding`` is for bf16 weights; without it they are rounded to the nearest.
        """
        given = (tuple(weight.shape), tuple(direction.shape))
        if given != (self.weight_shape, self.shape):
            raise ValueError(
                f"weight and direction are {given}: give {self.weight_shape} and {self.shape}"
            )
        basis = self._basis.matrix()
        if basis is None:
            raise RuntimeError("there is no basis yet: nothing was accumulated")
        left, right = (basis, direction) if self.side == "left" else (direction, basis.t())
        with torch.autocast(weight.device.type, enabled=False):
            projected_update_(
                weight, left, right, alpha=-lr * self._scale, decay=decay, rounding=rounding
            )

    def set_basis(self, basis: Tensor, *, frozen: bool = True) -> None:
        """Put in a basis [s, k], which sets the rank to k; frozen, it is never refreshed."""
        if self._gradient is not None:
            raise RuntimeError("the step's gradient is in the old basis: call clear() first")
        self._basis.set(basis, frozen=frozen)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that is held now, by name."""
        held = ("gradient", self._gradient), ("squared_norm", self._exact_squared_norm)
        own = {name: tensor for name, tensor in held if tensor is not None}
        return self._basis.tensors() | own

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs between two steps; the basis only once there is one."""
        return self._basis.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of the subspace that gave ``state``, between two steps."""
        self._basis.load_state_dict(state)
        self.clear()
