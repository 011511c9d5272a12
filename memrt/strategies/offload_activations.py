"""Activation offload: what autograd saves waits on the host and comes back in backward.

Exact: bits are copied, not changed. Saved tensors of at least `min_bytes` leave the device; the
device keeps one of them at a time while its backward runs. Host memory grows by the same bytes
(pinned on CUDA). What several operators save is moved out once, whatever its shapes and strides,
and back once for each of them, so traffic is the saved bytes times two or more: it pays together
with activation checkpointing, where only layer inputs move (2 × layers × tokens × hidden elements a
micro-batch). Of an expanded or sliced tensor only its own elements move.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ref

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
        # elements of a storage -> (that storage, their copy); weak, and the storage is compared
        # because an address is used again once a storage is gone
        self._copies: dict[Any, tuple[ref[UntypedStorage], ref[Tensor]]] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Copy the tensor away, unless it is small or not on the device."""
        elements, is_flat = _elements(tensor)
        num_bytes = elements.numel() * elements.element_size()
        if num_bytes < max(1, self.settings.min_bytes) or tensor.device != self.run.device:
            return tensor
        storage = tensor.untyped_storage()
        layout = (elements.shape, elements.stride(), elements.storage_offset(), elements.dtype)
        key = (id(storage), layout, tensor._version)
        known = self._copies.get(key)
        copy = known[1]() if known is not None and known[0]() is storage else None
        if copy is None:
            copy = self.run.move(elements, self.settings.place)
            self._copies[key] = (ref(storage), ref(copy))
        return (copy, tuple(tensor.shape), tensor.stride() if is_flat else None)

    def unpack(self, packed: Any) -> Tensor:
        """Copy it back; what had no gaps has its strides again."""
        copy, shape, strides = packed
        elements = self.run.move(copy, "device")
        return elements.expand(shape) if strides is None else elements.as_strided(shape, strides)

    @contextmanager
    def around_micro_batch(self) -> Iterator[None]:
        """Forget the copies of a micro-batch when it is over."""
        yield
        self._copies.clear()


def _elements(tensor: Tensor) -> tuple[Tensor, bool]:
    """What a tensor covers in memory, flat; with gaps in it, the tensor less its expanded dims."""
    tensor = tensor.detach()
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    covered = 1 + sum((size - 1) * stride for size, stride in steps)
    if covered != tensor.numel():
        return tensor, False
    return tensor.as_strided((covered,), (1,)), True
