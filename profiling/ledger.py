"""The ledger: every storage of a run from birth to death, by account, place and owner.

A lean `TorchDispatchMode` sees every operator's outputs and follows their storages with weak
references. It runs over real tensors (`memrt profile`) and over fake ones (`memrt plan`) alike, so
that the plan is the run on fake tensors. Accounts are known late (a tensor becomes a gradient only
after it was computed): a storage's first tag therefore reaches back to its birth, later tags hold
from their instant on. Peaks and breakdowns are computed afterwards from the log of births and
deaths.

What it cannot see: scratch inside an operator. An operator of ours that allocates more than its
outputs registers `workspace_bytes`, and the ledger adds it at that operator. A dispatch mode also
turns off autograd's in-place accumulation of gradients, so temporaries differ slightly from an
unobserved run.
"""

from __future__ import annotations

import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from memrt.profiling.accounts import Account, Place
from memrt.profiling.timeline import Record, Region, Timeline

__all__ = ["Ledger", "SavedToken", "register_workspace", "storages_of"]

_WORKSPACE_BYTES: dict[str, Callable[..., int]] = {}
_LAYER_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
_DEVICE_OF = torch.ops.prim.device.default
_PLAIN_TENSORS = (Tensor, nn.Parameter)

# an operator and a module are named again and again, and a name takes microseconds to make
_operator_name = cache(str)


@cache
def _without_index(module: str) -> str:
    return _LAYER_INDEX.sub("*", module)


def register_workspace(operator: str, workspace_bytes: Callable[..., int]) -> None:
    """Declare the scratch of a custom operator `"memrt::name"`, in bytes of its arguments."""
    _WORKSPACE_BYTES[operator] = workspace_bytes


def _num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; wrapper subclasses are flattened."""
    if type(tensor) not in _PLAIN_TENSORS and is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_num_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages that hold a tensor's bytes; wrapper subclasses are flattened."""
    if type(tensor) not in _PLAIN_TENSORS and is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [s for name in names for s in storages_of(getattr(tensor, name))]
    if tensor.layout is not torch.strided:
        return []
    return [tensor.untyped_storage()]


class SavedToken:
    """Held beside a tensor that autograd saved; its end gives the activations account back."""

    __slots__ = ("_ledger", "_records")

    def __init__(self, ledger: Ledger, records: list[Record]) -> None:
        self._ledger = ledger
        self._records = records

    def __del__(self) -> None:
        self._ledger._release(self._records)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes while it is entered as a context.

    `device_type` is where the model computes: its storages are in `Place.DEVICE`, CPU storages of a
    CUDA run are in `Place.HOST`. Costs about 20 µs an operator, 8 of which any dispatch mode takes,
    and some 200 bytes of host memory a storage born.
    """

    def __init__(self, *, device_type: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.timeline = Timeline()
        self.moved: dict[tuple[int, str], int] = {}
        """Bytes moved by optimizer step and direction, such as "device to host"."""
        self.on_operator: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None] | None = None
        """Told of every operator, its arguments and its result; a second dispatch mode costs more
        than what most have to do."""
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], Record]] = {}
        self._phase = "load"
        self._step = -1
        self._owner: str | None = None
        self._place: Place | None = None
        self._modules: list[str] = [""]
        self._sequence: list[int] = []
        self._forward_since: int | None = None
        self._sequence_modules: list[str] = []
        self._region_key: tuple[int, str, str] | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    # ---------------------------------------------------------------- counting

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _DEVICE_OF:
            return args[0].device
        if self._forward_since is not None and torch._C._current_graph_task_id() != -1:
            self._book_kept()
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._see(result, func)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item, func)
                elif isinstance(item, (tuple, list)):
                    for inner in item:
                        if isinstance(inner, Tensor):
                            self._see(inner, func)
        if func.namespace == "memrt":  # scratch lives beside the outputs
            self._count_workspace(func, args, kwargs or {})
        if self.on_operator is not None:
            self.on_operator(func, args, kwargs or {}, result)
        return result

    def _see(self, tensor: Tensor, func: Any) -> None:
        for storage in storages_of(tensor):
            if id(storage) not in self._live and tensor.device.type != "meta":  # has no bytes
                self._birth(storage, tensor, _operator_name(func))

    def _count_workspace(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        workspace_bytes = _WORKSPACE_BYTES.get(func._schema.name)
        if workspace_bytes is not None:
            num_bytes = workspace_bytes(*args, **kwargs)
            if num_bytes:
                record = self._record(num_bytes, Place.DEVICE, _operator_name(func))
                self.timeline.death(record)

    def _record(self, num_bytes: int, place: Place, operator: str) -> Record:
        phase, module = self._where()
        record = Record(
            num_bytes=num_bytes,
            place=place,
            operator=operator,
            module=module,
            owner=self._owner or _without_index(module) or phase,
        )
        self.timeline.birth(record, self._region(phase, module))
        return record

    def _birth(self, storage: torch.UntypedStorage, tensor: Tensor, operator: str) -> Record:
        record = self._record(storage.nbytes(), self._place or self._place_of(tensor), operator)
        key = id(storage)

        def died(_: object) -> None:
            del self._live[key]
            self.timeline.death(record)

        self._live[key] = (weakref.ref(storage, died), record)
        # The forward that checkpointing runs again inside backward recomputes activations. A module
        # runs then; gradients may be off, inside an autograd function of the forward.
        if torch._C._current_graph_task_id() != -1 and (
            torch.is_grad_enabled() or len(self._modules) > 1
        ):
            self.timeline.tag(record, Account.ACTIVATIONS)
        return record

    def _place_of(self, tensor: Tensor) -> Place:
        return Place.DEVICE if tensor.device.type == self.device_type else Place.HOST

    def records_of(self, tensor: Tensor) -> list[Record]:
        """The records of a tensor's storages; born now when they were not seen before."""
        found = []
        for storage in storages_of(tensor):
            live = self._live.get(id(storage))
            found.append(live[1] if live else self._birth(storage, tensor, "found"))
        return found

    def count_move(self, tensor: Tensor, place: Place) -> None:
        """A copy of `tensor` is made in `place`: bytes on the way, if it is another place."""
        known = [self._live[id(s)] for s in storages_of(tensor) if id(s) in self._live]
        source = known[0][1].place if known else self._place_of(tensor)
        if source is not place:
            key = (self._step, f"{source.value} to {place.value}")
            self.moved[key] = self.moved.get(key, 0) + _num_bytes(tensor)

    # ---------------------------------------------------------------- accounts

    def tag(
        self,
        tensor: Tensor,
        account: Account,
        *,
        owner: str | None = None,
        module: str | None = None,
    ) -> None:
        """Book a tensor's storages to an account; the first tag reaches back to their birth."""
        for record in self.records_of(tensor):
            if record.account is not account:
                self.timeline.tag(record, account, reach_back=True)
            if owner is not None:
                record.owner = owner
            if module is not None:
                record.module = module

    def save(self, tensor: Tensor) -> SavedToken:
        """Book a tensor that autograd saves to the activations account until the token ends."""
        records = self.records_of(tensor)
        for record in records:
            record.num_saved += 1
            if record.account in (None, Account.WORKSPACE):
                self.timeline.tag(record, Account.ACTIVATIONS)
        return SavedToken(self, records)

    def _release(self, records: list[Record]) -> None:
        for record in records:
            record.num_saved -= 1
            if not record.num_saved and record.account is Account.ACTIVATIONS and record.alive:
                self.timeline.tag(record, Account.WORKSPACE)

    def register_model(self, model: nn.Module) -> None:
        """Book parameters and buffers to the weights account and follow which module runs."""
        self.book_weights(model)
        self.watch_modules(model)

    def book_weights(self, model: nn.Module) -> None:
        """Book parameters and buffers to the weights account."""
        for name, module in model.named_modules():
            for part in (*module._parameters.items(), *module._buffers.items()):
                if part[1] is not None:
                    self.tag(part[1], Account.WEIGHTS, owner="model", module=f"{name}.{part[0]}")

    def book_gradients(self, model: nn.Module) -> None:
        """Book every `.grad` that exists now."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.tag(parameter.grad, Account.GRADIENTS, owner="gradients", module=name)

    def book_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Book every tensor in the optimizer's state, and those that it shares between states."""
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self.tag(value, Account.OPTIMIZER, owner="optimizer")
        shared = getattr(optimizer, "shared_tensors", None)  # such as int8's code maps
        for value in shared() if shared is not None else ():
            self.tag(value, Account.OPTIMIZER, owner="optimizer")

    # ---------------------------------------------------------------- where we are

    def now(self) -> tuple[int, str]:
        """Optimizer step and phase of what runs."""
        return self._step, self._where()[0]

    @contextmanager
    def phase(self, name: str, *, step: int | None = None) -> Iterator[None]:
        """Name what runs now: load, forward, step, evaluate, save, probe. Backward is seen."""
        before = (self._phase, self._step)
        self._phase = name
        self._step = self._step if step is None else step
        try:
            yield
        finally:
            self._phase, self._step = before

    def finish_loading(self) -> None:
        """From now on, what runs outside of every phase is called `other`."""
        if self._phase == "load":
            self._phase = "other"

    @contextmanager
    def owned_by(self, owner: str) -> Iterator[None]:
        """Storages born inside belong to `owner`."""
        before, self._owner = self._owner, owner
        try:
            yield
        finally:
            self._owner = before

    @contextmanager
    def placing(self, place: Place) -> Iterator[None]:
        """Storages born inside lie in `place`, whatever their device says."""
        before, self._place = self._place, place
        try:
            yield
        finally:
            self._place = before

    def watch_modules(self, model: nn.Module) -> None:
        """Follow which module runs, through forward hooks (undone by `close`)."""
        for name, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._enter(name)))
            self._hooks.append(module.register_forward_hook(self._leave(), always_call=True))

    def close(self) -> None:
        """Remove the hooks. The log stays readable."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        def pre_hook(module: nn.Module, args: Any) -> None:
            self._modules.append(name)
            self._mark_sequence()

        return pre_hook

    def _leave(self) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._modules.pop()
            self._mark_sequence()

        return hook

    def _mark_sequence(self) -> None:
        """Remember which module made which autograd nodes, so that backward can be attributed."""
        if torch._C._current_graph_task_id() == -1 and torch.is_grad_enabled():
            self._sequence.append(torch._C._autograd._get_sequence_nr())
            self._sequence_modules.append(self._modules[-1])

    def begin_step(self, step: int) -> None:
        """From now on all belongs to this optimizer step, until the next begins."""
        self._step = step

    def begin_micro_batch(self) -> None:
        """Drop the map from autograd nodes to modules; what is born from now on is its forward."""
        self._sequence.clear()
        self._sequence_modules.clear()
        self._forward_since = self.timeline.now

    def _book_kept(self) -> None:
        """Backward begins: what the layers left alive is kept for it (selective caches)."""
        since, self._forward_since = self._forward_since or 0, None
        for _, record in list(self._live.values()):
            if record.birth >= since and not record.tags and _LAYER_INDEX.search(record.module):
                self.timeline.tag(record, Account.ACTIVATIONS)

    def _where(self) -> tuple[str, str]:
        if torch._C._current_graph_task_id() == -1:
            return self._phase, self._modules[-1]
        phase = "backward" if self._phase == "forward" else self._phase
        if len(self._modules) > 1:  # recomputation inside backward
            return phase, self._modules[-1]
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        index = bisect_right(self._sequence, number) - 1
        if index < 0 or number > 1 << 62:  # AccumulateGrad nodes carry the largest number
            return phase, self._region_key[2] if self._region_key else ""
        return phase, self._sequence_modules[index]

    def _region(self, phase: str, module: str) -> Region:
        self._region_key = (self._step, phase, module)
        return self.timeline.region(step=self._step, phase=phase, module=module)
