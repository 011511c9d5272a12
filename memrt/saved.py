"""The run's only saved-tensor hooks: strategies' pack stages in phase order, then the ledger.

Nested saved-tensor hooks do not compose (only the innermost is called), so the session installs one
pair and chains the stages. With no stage and no ledger it installs none, and autograd runs as ever.

Under hooks autograd no longer notices that a saved tensor was changed in place, so the chain does:
what it keeps by reference must have the version that it was saved with.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memrt.strategy import Attachment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from memrt.observer import Observer
    from memrt.profiling.ledger import SavedToken

__all__ = ["SavedTensorChain"]


class _Kept(NamedTuple):
    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        # a saved output would else hold the graph that holds it
        return cls(tensor.detach() if tensor.requires_grad else tensor, tensor._version)

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a {self.tensor.dtype} tensor of shape "
                f"{list(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead"
            )
        return self.tensor


class _Packed(NamedTuple):
    stage: int
    payload: Any


class _Held(NamedTuple):
    packed: Any
    tokens: tuple[SavedToken, ...]


def _map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(function, item) for item in value)
    return value


class SavedTensorChain:
    """Packs what autograd saves through every stage, and unpacks it in reverse.

    Parameters and buffers are passed by: they live anyway.
    """

    def __init__(
        self, attachments: Sequence[Attachment], model: nn.Module, observer: Observer
    ) -> None:
        self._stages = [a for a in attachments if type(a).pack is not Attachment.pack]
        self._model = model
        self._observer = observer
        self._weights: frozenset[int] = frozenset()

    def hooks(self) -> AbstractContextManager[Any]:
        """A context for one micro-batch."""
        if not self._stages and self._observer.ledger is None:
            return nullcontext()
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self._weights = frozenset(t.untyped_storage()._cdata for t in tensors)
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata in self._weights:
            return _Kept.of(tensor)
        packed = self._pack_from(0, tensor)
        if self._observer.ledger is None:
            return packed
        tokens: list[SavedToken] = []
        self._save(packed, tokens)
        return _Held(packed, tuple(tokens))

    def _save(self, packed: Any, tokens: list[SavedToken]) -> None:
        if isinstance(packed, Tensor):
            assert self._observer.ledger is not None
            tokens.append(self._observer.ledger.save(packed))
        elif isinstance(packed, tuple):
            for item in packed:
                self._save(item, tokens)

    def _pack_from(self, first: int, tensor: Tensor) -> Any:
        for index in range(first, len(self._stages)):
            packed = self._stages[index].pack(tensor)
            if packed is not tensor:
                return _Packed(index, _map_tensors(partial(self._pack_from, index + 1), packed))
        return _Kept.of(tensor)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Held):
            return self._unpack(packed.packed)
        if isinstance(packed, _Kept):
            return packed.get()
        if isinstance(packed, _Packed):
            payload = packed.payload
            inner = (
                tuple(self._unpack_leaf(item) for item in payload)
                if type(payload) is tuple
                else self._unpack_leaf(payload)
            )
            return self._stages[packed.stage].unpack(inner)
        raise TypeError(f"{type(packed).__name__} was not packed here")

    def _unpack_leaf(self, value: Any) -> Any:
        if isinstance(value, (_Packed, _Held, _Kept)):
            return self._unpack(value)
        if type(value) is tuple:
            return tuple(self._unpack_leaf(item) for item in value)
        return value
