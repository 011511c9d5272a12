"""The tensors of a model on meta, filled one by one through the strategies' weight door.

While a strategy replaces a tensor, nothing else holds it: its place in the model is empty and the
caller handed over a function instead of the tensor. So a chain of strategies holds the tensor that
it was given and the one that it makes, not one for each link.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt.initialization import tensor_names
from memrt.machine import return_free_memory
from memrt.profiling.accounts import Account
from memrt.profiling.fake import is_fake

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memrt.profiling.ledger import Ledger
    from memrt.strategy import Loading

__all__ = ["WeightSlots"]


class WeightSlots:
    """The places of a meta model's tensors, filled one by one through the strategies."""

    def __init__(
        self,
        model: Any,
        strategies: Sequence[Loading],
        *,
        device: torch.device,
        ledger: Ledger | None,
    ) -> None:
        self.model = model
        self.ties: dict[str, str] = dict(model.all_tied_weights_keys)
        """A name -> the name whose tensor it shares in the end."""
        self.meta = tensor_names(model)
        self.done: set[str] = set()
        self.on_placed: Callable[[], None] = lambda: None
        self._strategies = strategies
        self._device = device
        self._ledger = ledger
        self._names: dict[int, list[str]] = {}
        for name, tensor in self.meta.items():
            self._names.setdefault(id(tensor), []).append(name)

    @property
    def num_tensors(self) -> int:
        """How many tensors are placed, one for each group of tied names."""
        return len(self._names) - len(self.ties)

    def materialise(self, name: str) -> None:
        """Give a tensor uninitialised memory."""
        meta = self.meta[name]
        size, stride = meta.size(), meta.stride()
        tensor = torch.empty_strided(size, stride, dtype=meta.dtype, device=self._device)
        put = self._put(name, tensor)
        # a fake weight has no values; some initialisers would look at them
        put._is_hf_initialized = is_fake(tensor) and isinstance(put, nn.Parameter)  # type: ignore[attr-defined]

    def place(self, name: str) -> None:
        """Hand on a tensor that was initialised in place; a tied name's own draw is dropped."""
        if name in self.ties:
            self._put(name, self.meta[name])
        elif name not in self.done:
            self.fill(name, lambda: self._take(name))

    def fill(self, name: str, produce: Callable[[], Tensor]) -> None:
        """Put the tensor that `produce` gives through the strategies and in its place.

        It comes from a function so that no caller holds a reference while a strategy replaces it.
        """
        tensor = produce()
        owner = "model"
        if isinstance(self.meta[name], nn.Parameter):
            for strategy in self._strategies:
                with self._ledger.owned_by(strategy.name) if self._ledger else nullcontext():
                    result = strategy.place_weight(name, tensor)
                if not isinstance(result, Tensor):
                    raise TypeError(
                        f"strategy {strategy.name!r}: place_weight({name!r}) returned "
                        f"{type(result).__name__}; it must return a tensor"
                    )
                owner = owner if result is tensor else strategy.name
                tensor = result
                del result
        if owner != "model" and not is_fake(tensor):
            return_free_memory()  # of what the strategy needed meanwhile
        placed = self._put(name, tensor)
        placed._is_hf_initialized = True  # type: ignore[attr-defined]
        if self._ledger is not None:
            self._ledger.tag(placed, Account.WEIGHTS, owner=owner, module=name)
        self.done.update(self._names[id(self.meta[name])])
        self.on_placed()

    def tie(self) -> None:
        """Make tied names share one parameter."""
        for name, leader in self.ties.items():
            self._set(name, self._get(leader))

    def _get(self, name: str) -> Any:
        module, _, attribute = name.rpartition(".")
        return getattr(self.model.get_submodule(module), attribute)

    def _set(self, name: str, tensor: Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
        else:
            module._parameters[attribute] = tensor

    def _put(self, name: str, tensor: Tensor) -> Tensor:
        meta = self.meta[name]
        if isinstance(meta, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            trains = meta.requires_grad and tensor.is_floating_point()
            tensor = nn.Parameter(tensor, requires_grad=trains)
        for same in self._names[id(meta)]:
            self._set(same, tensor)
        return tensor

    def _take(self, name: str) -> Tensor:
        tensor: Tensor = self._get(name).detach()
        self._put(name, self.meta[name])
        return tensor
