"""Moving tensors between device, host and disk; on CPU and fake runs the place is a mark."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memrt.profiling.accounts import Place

if TYPE_CHECKING:
    from torch import nn

    from memrt.observer import Observer

__all__ = ["Mover", "place_named"]


def place_named(place: Place | str) -> Place:
    """The place of this name; `ValueError` with the known ones if there is none."""
    try:
        return Place(place)
    except ValueError:
        known = ", ".join(p.value for p in Place)
        raise ValueError(f"place={place!r} is unknown; use one of: {known}") from None


class Mover:
    """Copies tensors into a place and tells the ledger where they lie."""

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self._model = model
        self._observer = observer

    def move(self, tensor: Tensor, place: Place | str) -> Tensor:
        """A copy of `tensor` in `place`, of the same shape, dtype and values.

        Host copies of CUDA tensors are pinned. Disk copies are memory-mapped files in the folder
        for temporary files (TMPDIR), which have no name and go with the tensor.
        """
        target = place_named(place)
        self._observer.count_move(tensor, target)
        with self._observer.placing(target), torch.no_grad():
            if target is Place.DISK:
                return self._to_disk(tensor)
            device = next(self._model.parameters()).device
            if target is Place.HOST and tensor.is_cuda:
                copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
                return copy.copy_(tensor)
            if target is Place.DEVICE and tensor.device != device:
                return tensor.to(device, non_blocking=tensor.is_pinned())
            return tensor.clone()

    def _to_disk(self, tensor: Tensor) -> Tensor:
        from torch._subclasses.fake_tensor import FakeTensor

        if isinstance(tensor, FakeTensor):
            return tensor.clone()
        size = max(tensor.numel(), 1)
        with tempfile.NamedTemporaryFile(prefix="memrt-disk-") as file:
            if hasattr(os, "posix_fallocate"):  # or a full disk would kill the process at a write
                os.posix_fallocate(file.fileno(), 0, size * tensor.element_size())
            mapped = torch.from_file(file.name, shared=True, size=size, dtype=tensor.dtype)
        # the name is gone; the mapping keeps the bytes until the tensor dies
        return mapped[: tensor.numel()].view(tensor.shape).copy_(tensor)
