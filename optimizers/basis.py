"""The basis of a subspace between two steps: how it is kept, when it moves, what moves with it.

P [s, r], s the smaller side of a weight, its columns orthonormal when they were found:

| format   | an element is kept as                                            | bytes an element |
|----------|------------------------------------------------------------------|------------------|
| float32  | itself                                                           | 4                |
| bfloat16 | rounded; PᵀP is off by up to 2^-8                                | 2                |

A refresh replaces the columns. Their signs are aligned to the old ones, diag(P_newᵀ P_old) >= 0
(``align=False``: as they were found), and the ``moments`` of the old columns are

    "keep"    left as they are, though they now belong to other directions (GaLore)

Workspace of a refresh: a few matrices [s, r] in fp32.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from memrt.optimizers.refresh import RefreshSchedule, overlap

__all__ = ["BasisFormat", "MovingBasis"]

BasisFormat = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MovingBasis:
    """The basis [size, rank] of one weight, with its schedule; whoever holds it finds it."""

    def __init__(
        self,
        size: int,
        rank: int,
        *,
        every: int,
        offset: int = 0,
        lazy: float | None = None,
        format: BasisFormat = "float32",
        align: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if format not in get_args(BasisFormat):
            raise ValueError(f"basis is {format!r}: give one of {', '.join(get_args(BasisFormat))}")
        self.size, self.rank = size, rank
        self.schedule = RefreshSchedule(every=every, offset=offset, lazy=lazy)
        self.refresh_count = 0
        self.frozen = False
        self.pending = False
        self.device = torch.device(device)
        self._align = align
        self._dtype = _DTYPES[format]
        self._columns: Tensor | None = None  # [size, rank]

    @property
    def exists(self) -> bool:
        """Whether one was found, or put in."""
        return self._columns is not None

    def matrix(self) -> Tensor | None:
        """The basis in fp32: for the format "float32" without a copy."""
        return None if self._columns is None else self._columns.float()

    def begin_step(self, step: int) -> None:
        """Decide whether a refresh is pending; one that found no gradient stays so."""
        due = self.schedule.due(step) or not self.exists
        self.pending = not self.frozen and (self.pending or due)

    def request_refresh(self) -> None:
        """Refresh at the next gradient, as after a step skipped for infinities."""
        if self.frozen:
            raise RuntimeError("the basis is frozen: call set_basis(..., frozen=False) first")
        self.pending = True

    def move(self, found: Tensor, sound: Tensor, *, fallback: Tensor | None = None) -> None:
        """Replace it by ``found`` where ``sound`` (0-dim bool), else keep the old one.

        ``fallback`` stands in for an old one that there is none of.
        """
        old = self.matrix()
        if old is None:
            assert fallback is not None
            new = torch.where(sound, found, fallback)
        else:
            if self._align:
                found = found * torch.where((found * old).sum(dim=0) < 0.0, -1.0, 1.0)
            new = torch.where(sound, found, old)
            if self.schedule.is_lazy:
                self.schedule.note(overlap(old, new))
        self._columns = new.to(self._dtype)
        self.refresh_count += 1
        self.pending = False

    def set(self, basis: Tensor, *, frozen: bool) -> None:
        """Put in a basis [size, k], which sets the rank to k; frozen, it is never refreshed."""
        if basis.dim() != 2 or basis.shape[0] != self.size or not 1 <= basis.shape[1] <= self.size:
            raise ValueError(
                f"basis is {tuple(basis.shape)}: give [{self.size}, k] with k at most {self.size}"
            )
        self._columns = basis.detach().to(device=self.device, dtype=self._dtype, copy=True)
        self.rank = basis.shape[1]
        self.frozen, self.pending = frozen, False

    def forget(self) -> None:
        """Free it, as when the weight stops training; its next gradient finds one."""
        if not self.frozen:
            self._columns = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is held, by name."""
        held = {} if self._columns is None else {"basis": self._columns}
        return held | self.schedule.tensors()

    def state_dict(self) -> dict[str, Any]:
        """What a later run needs between two steps; the basis only once there is one."""
        state: dict[str, Any] = {} if self._columns is None else {"basis": self._columns}
        state |= {"refresh_count": self.refresh_count, "frozen": self.frozen}
        return state | {"refresh_pending": self.pending, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of the basis that gave ``state``."""
        basis = state.get("basis")
        expected = (self.size, self.rank)
        if basis is not None and tuple(basis.shape) != expected:
            raise ValueError(
                f"the saved basis is {tuple(basis.shape)}, not {expected}: resume with its rank"
            )
        options: dict[str, Any] = {"device": self.device, "dtype": self._dtype}
        self._columns = None if basis is None else basis.to(**options, copy=True)
        self.refresh_count = int(state["refresh_count"])
        self.pending = bool(state["refresh_pending"])
        self.frozen = bool(state["frozen"])
        self.schedule.load_state_dict(state["schedule"], device=self.device)
