"""Moving tensors between device, host and disk; on CPU and fake runs the place is a mark."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memrt.profiling.accounts import Place

if TYPE_CHECKING:
    from torch import nn

    from memrt.observer import Observer

__all__ = ["Mover"]


class Mover:
    """Copies tensors into a place and tells the ledger where they lie."""

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self._model = model
        self._observer = observer
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_files = 0

    def move(self, tensor: Tensor, place: Place | str) -> Tensor:
        """A copy of `tensor` in `place`, of the same shape, dtype and values.

        Host copies of CUDA tensors are pinned. Disk copies are memory-mapped files in a temporary
        folder that goes with the session.
        """
        try:
            target = Place(place)
        except ValueError:
            known = ", ".join(p.value for p in Place)
            raise ValueError(f"place={place!r} is unknown; use one of: {known}") from None
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
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="memrt-disk-")
        self._num_files += 1
        path = Path(self._folder.name) / f"{self._num_files}.bin"
        mapped = torch.from_file(
            str(path), shared=True, size=max(tensor.numel(), 1), dtype=tensor.dtype
        )
        path.unlink()  # the mapping keeps the bytes until the tensor dies; none are left behind
        return mapped[: tensor.numel()].view(tensor.shape).copy_(tensor)
