"""Activation offload: what autograd saves waits on the host and comes back in backward.

Exact: bits are copied, and come back in the strides that they had (other strides make other
rounding). Saved tensors of at least `min_bytes` leave the device; the device keeps one of them at a
time while its backward runs. Host memory grows by the same bytes (pinned on CUDA). What several
operators save is moved out once, whatever its shapes and strides, and back for each of them, so
traffic is the saved bytes times two or more: it pays together with activation checkpointing, where
only layer inputs move (2 × layers × tokens × hidden elements a micro-batch). With a slice goes the
storage that it is cut from, which would else stay on the device with it; a slice of a storage more
than 16 times its size stays. The idea is that of PyTorch's `torch.autograd.graph.save_on_cpu`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from weakref import ref

import torch
from torch import Tensor, UntypedStorage

from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategy import Attachment, Claim, Phase, Slot, Strategy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["OffloadActivations"]

PLACES = ("host", "disk")
# a window on a resident data set must not take the data set along at every step
LARGEST_STORAGE_OF_A_SLICE = 16

Kept = TypeVar("Kept", Tensor, UntypedStorage)


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadActivations(Strategy):
    """Settings.

    place: where saved tensors wait: "host" or "disk" (memory-mapped files).
    min_bytes: smaller tensors stay on the device (a transfer costs more than it frees).
    """

    name: ClassVar[str] = "offload_activations"
    phase: ClassVar[Phase] = Phase.ACTIVATIONS
    lowers: ClassVar[tuple[Account, ...]] = (Account.ACTIVATIONS,)
    exact: ClassVar[bool] = True

    place: str = "host"
    min_bytes: int = 1024

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"place={self.place!r}: use one of {', '.join(PLACES)}")
        whole = isinstance(self.min_bytes, int) and not isinstance(self.min_bytes, bool)
        if not whole or self.min_bytes < 0:
            raise ValueError(f"min_bytes={self.min_bytes!r}: must be a number of bytes, 0 or more")

    def claims(self, facts: Facts) -> list[Claim]:
        """The place of everything that autograd saves."""
        return [Claim(slot=Slot.SAVED_PLACE)]

    def attach(self, run: Session) -> Attachment:
        """Nothing is changed in the model."""
        return _Offload(self, run)


class _Offload(Attachment):
    settings: OffloadActivations

    def __init__(self, settings: OffloadActivations, run: Session) -> None:
        super().__init__(settings, run)
        # part of a storage -> its copy, and copy -> the storage that came back; while both live
        self._copies: dict[Any, tuple[ref[UntypedStorage], ref[Tensor]]] = {}
        self._restored: dict[Any, tuple[ref[Tensor], ref[UntypedStorage]]] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Copy the tensor away, unless it is small or not on the device."""
        first, length = _extent(tensor)
        num_bytes = length * tensor.element_size()
        if num_bytes < max(1, self.settings.min_bytes) or tensor.device != self.run.device:
            return tensor
        storage = tensor.untyped_storage()
        whole = (0, storage.nbytes() // tensor.element_size())
        for part in (whole, (first, length)):
            key = (id(storage), part, tensor.dtype, tensor._version)
            copy = _alive(self._copies, key, storage)
            if copy is not None or part == (first, length):
                break
        if copy is None:
            flat = tensor.detach().as_strided((length,), (1,), first)
            copy = self.run.move(flat, self.settings.place)
            self._copies[key] = (ref(storage), ref(copy))
        return (copy, tuple(tensor.shape), tensor.stride(), tensor.storage_offset() - part[0])

    def unpack(self, packed: Any) -> Tensor:
        """Copy it back, or look at what is back already for another operator."""
        copy, shape, strides, offset = packed
        storage = _alive(self._restored, id(copy), copy)
        if storage is None:
            flat = self.run.move(copy, "device")
            self._restored[id(copy)] = (ref(copy), ref(flat.untyped_storage()))
            return flat.as_strided(shape, strides, offset)
        view = torch.empty(0, dtype=copy.dtype, device=self.run.device)
        return view.set_(storage, offset, shape, strides)

    @contextmanager
    def around_micro_batch(self) -> Iterator[None]:
        """Forget the copies of a micro-batch when it is over."""
        yield
        self._copies.clear()
        self._restored.clear()


def _alive(table: dict[Any, tuple[ref[Any], ref[Kept]]], key: Any, owner: object) -> Kept | None:
    """What the table has for a key, if it lives and is of this owner.

    An owner's identity is compared, because an address is used again once an object is gone.
    """
    entry = table.get(key)
    return entry[1]() if entry is not None and entry[0]() is owner else None


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First element and number of elements of the storage that move with a tensor (0: none)."""
    if not tensor.numel():
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    covered = 1 + sum((size - 1) * stride for size, stride in steps)
    if covered <= tensor.numel():
        return int(tensor.storage_offset()), covered
    whole = tensor.untyped_storage().nbytes() // tensor.element_size()
    return 0, whole if whole <= LARGEST_STORAGE_OF_A_SLICE * tensor.numel() else 0
