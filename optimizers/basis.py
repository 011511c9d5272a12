"""The basis of a subspace between two steps: how it is kept, and when it moves.

P [s, r], s the smaller side of a weight, its columns orthonormal when they were found:

| format   | an element is kept as                                            | bytes an element |
|----------|------------------------------------------------------------------|------------------|
| float32  | itself                                                           | 4                |
| bfloat16 | rounded; PᵀP is off by up to 2^-8                                | 2                |
| int4     | a code and a share in its group's scale and minimum              | 1/2 + 4/256      |

int4 (``memrt.kernels.uniform_int4``; Q-GaLore, arXiv 2407.08296) is restored to fp32 whenever it is
used, 4 · s · r of workspace; its columns are orthonormal to about a tenth. Gradient and update go
through the same restored matrix.

A refresh replaces the columns. Their signs are aligned to the old ones, diag(P_newᵀ P_old) >= 0
(``align=False``: as they were found), and the moments are kept as they are, as GaLore keeps them,
or rotated along (``rotates=True``): the optimizer takes T = P_newᵀ P_old [r, r] with the next step
(`memrt.optimizers.moment_rotation`). Rotating V by (T ∘ T) V alone and dropping them were tried and
left out: on a Llama of width 96, rank 12, after 150 steps of 8 × 64 tokens at lr 5e-3, two seeds,
the training loss was higher by .64 and .72 (dropped: .35, .25) with a refresh every 2 steps, by .30
and .26 (.21, .13) every 10, by 0 and .06 (.24, .02) every 50. (CPU, torch 2.13, commit 2d23dd5;
other learning rates were not tried.)

A gradient that is zero or not finite moves nothing: the refresh stays pending, and each further
gradient is asked, at the cost of a refresh. Until one is found, some orthonormal basis stands in.

Workspace of a refresh: a few matrices [s, r] in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from memrt.kernels.finite import all_finite
from memrt.kernels.uniform_int4 import (
    PackedInt4,
    int4_dequantize,
    int4_quantize,
    int4_shapes,
)
from memrt.optimizers.refresh import RefreshSchedule, overlap

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BasisFormat", "MovingBasis"]

BasisFormat = Literal["float32", "bfloat16", "int4"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_INT4 = {"basis_codes": torch.uint8, "basis_scales": torch.bfloat16, "basis_minima": torch.bfloat16}


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
        rotates: bool = False,
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
        self._align, self._rotates, self._format = align, rotates, format
        self._rotation: Tensor | None = None  # of a move that the moments have not followed
        self._kept: dict[str, Tensor] = {}  # of _layout's names
        self._stands_in = False

    @property
    def exists(self) -> bool:
        """Whether one was found, or put in, or stands in for one."""
        return bool(self._kept)

    def matrix(self) -> Tensor | None:
        """The basis in fp32: for the format "float32" without a copy."""
        if not self._kept:
            return None
        if self._format != "int4":
            return self._kept["basis"].float()
        packed = PackedInt4(*(self._kept[name] for name in _INT4))
        return int4_dequantize(packed, (self.size, self.rank))

    def found(self) -> Tensor | None:
        """`matrix`, unless it stands in for one that was not found yet."""
        return None if self._stands_in else self.matrix()

    def _encoded(self, matrix: Tensor) -> dict[str, Tensor]:
        if self._format != "int4":
            return {"basis": matrix.to(_DTYPES[self._format])}
        return dict(zip(_INT4, int4_quantize(matrix), strict=True))

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that is kept, by name."""
        if self._format != "int4":
            return {"basis": ((self.size, self.rank), _DTYPES[self._format])}
        shapes = int4_shapes(self.size * self.rank)
        return {name: (shape, _INT4[name]) for name, shape in zip(_INT4, shapes, strict=True)}

    def begin_step(self, step: int) -> None:
        """Decide whether a refresh is pending; one that found no sound gradient stays so."""
        due = self.schedule.due(step) or not self.exists
        self.pending = not self.frozen and (self.pending or due)

    def request_refresh(self) -> None:
        """Refresh at the next gradient, as after a step skipped for infinities."""
        if self.frozen:
            raise RuntimeError("the basis is frozen: call set_basis(..., frozen=False) first")
        self.pending = True

    def move(
        self, found: Tensor, sound: Tensor, *, fallback: Callable[[], Tensor] | None = None
    ) -> None:
        """Replace it by ``found`` where ``sound`` (0-dim bool); else keep it and seek on.

        ``fallback`` makes what stands in for one that there is none of, until one is found.
        """
        if not _on_host(sound):
            if not self.exists:
                assert fallback is not None
                self._kept, self._stands_in = self._encoded(fallback()), True
            return
        old = self.found()
        if old is not None and self._align:
            found = found * torch.where((found * old).sum(dim=0) < 0.0, -1.0, 1.0)
        else:  # it may be a view, which would keep all of the vectors
            found = found.clone(memory_format=torch.contiguous_format)
        if old is not None and self.schedule.is_lazy:
            self.schedule.note(overlap(old, found))
        self._kept, self._stands_in = self._encoded(found), False
        if self._rotates and old is not None:
            self._rotation = self._rotation_from(old)
        self.refresh_count += 1
        self.pending = False

    def _rotation_from(self, old: Tensor) -> Tensor:
        new = self.matrix()
        assert new is not None
        return new.t() @ old

    def take_rotation(self) -> Tensor | None:
        """P_newᵀ P_old [r, r] of the last move, once; None where the moments need no rotation."""
        rotation, self._rotation = self._rotation, None
        return rotation

    def set(self, basis: Tensor, *, frozen: bool) -> None:
        """Put in a basis [size, k], which sets the rank to k; frozen, it is never refreshed."""
        if basis.dim() != 2 or basis.shape[0] != self.size or not 1 <= basis.shape[1] <= self.size:
            raise ValueError(
                f"basis is {tuple(basis.shape)}: give [{self.size}, k] with k at most {self.size}"
            )
        matrix = basis.detach().to(device=self.device, dtype=torch.float32, copy=True)
        self._kept, self._stands_in = self._encoded(matrix), False
        self.rank = basis.shape[1]
        self.frozen, self.pending, self._rotation = frozen, False, None

    def forget(self) -> None:
        """Free it, as when the weight stops training; its next gradient finds one."""
        if not self.frozen:
            self._kept, self._rotation, self._stands_in = {}, None, False

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is held, by name."""
        rotation = {} if self._rotation is None else {"rotation": self._rotation}
        return self._kept | rotation | self.schedule.tensors()

    def relocate(self, move: Callable[[Tensor], Tensor]) -> None:
        """Take `move` of every tensor in its place, as when the weight waits for its turn."""
        self._kept = {name: move(tensor) for name, tensor in self._kept.items()}
        self.schedule.relocate(move)

    def state_dict(self) -> dict[str, Any]:
        """What a later run needs between two steps; the basis only once there is one."""
        state: dict[str, Any] = dict(self._kept)
        if self._rotation is not None:  # in the middle of a step
            state["rotation"] = self._rotation
        if self._stands_in:
            state["stands_in"] = True
        state |= {"refresh_count": self.refresh_count, "frozen": self.frozen}
        return state | {"refresh_pending": self.pending, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of the basis that gave ``state``."""
        saved = {name: state[name] for name in ("basis", *_INT4) if name in state}
        layout = self._layout()
        if saved and {n: (tuple(t.shape), t.dtype) for n, t in saved.items()} != layout:
            found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in saved.values())
            raise ValueError(
                f"the saved basis is {found}, not one of {(self.size, self.rank)} in "
                f"{self._format}: resume with its rank and format"
            )
        self._kept = {name: tensor.to(self.device, copy=True) for name, tensor in saved.items()}
        self._stands_in = bool(state.get("stands_in", False))
        rotation = state.get("rotation")
        self._rotation = None if rotation is None else rotation.to(self.device, copy=True)
        self.refresh_count = int(state["refresh_count"])
        self.pending = bool(state["refresh_pending"])
        self.frozen = bool(state["frozen"])
        self.schedule.load_state_dict(state["schedule"], device=self.device)


def _on_host(sound: Tensor) -> bool:
    """What the solvers of a refresh have waited for already; of fake tensors: yes."""
    return bool(all_finite([torch.where(sound, 0.0, torch.nan)]))
