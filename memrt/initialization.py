"""Random weights, one module at a time, with the bits that transformers' `from_config` draws.

`from_config` holds the whole model while it draws. Here the model is built on meta, which costs no
bytes, and two things are read off it: which random numbers its constructors draw (they are thrown
away later, but they move the generator), and which tensors each call of `_init_weights` writes.
Then the calls run in transformers' order on tensors that are made just before their first write
and handed on right after their last, so that what is alive is the result so far plus what one call
writes: a module's own tensors, which is one for most (a layer's experts, or the four weights that
CLIP's attention writes for its children, are more). On top comes the scratch of the initialiser:
none for all but `trunc_normal_` (ModernBERT, ViT), where torch takes up to 4.5 times the tensor.

Bits: equal to `torch.manual_seed(seed); from_config(config)`. For that the thrown-away draws are
drawn again into one scratch tensor each, which costs the time that `from_config` spends on them.
Source: `PreTrainedModel.post_init`, `initialize_weights` and `_init_weights`, transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Draw", "InitCall", "Skeleton", "TensorSlots", "initialize", "tensor_names"]


class TensorSlots(Protocol):
    """What `initialize` needs of the model under construction."""

    def materialise(self, name: str) -> None:
        """Give the tensor uninitialised memory."""

    def place(self, name: str) -> None:
        """The tensor has its final values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A random operator that a constructor ran, and the storages it wrote."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    storages: frozenset[int]

    def repeat(self, device: torch.device) -> None:
        """Move the generator as the operator did; costs one scratch tensor."""

        def scratch(value: Any) -> Any:
            if isinstance(value, Tensor):
                return torch.empty_like(value, device=device)
            return device if isinstance(value, torch.device) else value

        self.operator(*tree_map(scratch, self.args), **tree_map(scratch, self.kwargs))


@dataclass(frozen=True, slots=True, kw_only=True)
class InitCall:
    """One `owner._init_weights(module)`, and the tensors that it writes."""

    owner: Any
    module: nn.Module
    writes: tuple[str, ...]

    def run(self) -> None:
        """Write the values and mark the module as transformers does."""
        self.owner._init_weights(self.module)
        self.module._is_hf_initialized = True  # type: ignore[assignment]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes random operators, and storages that operators write in place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Draw] = []
        self.written: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = {_storage(tensor) for tensor in _mutated(func, args, kwargs)}
        self.written |= written
        if torch.Tag.nondeterministic_seeded in func.tags:
            made = {_storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
            storages = frozenset(written | made)
            self.draws.append(Draw(operator=func, args=args, kwargs=kwargs, storages=storages))
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        if isinstance(value, Tensor):
            yield value


class _Probe(nn.Parameter):
    """A tensor that notes when an initialiser asks for its mark, as transformers' do before they
    write. Some write nothing on meta (`trunc_normal_`), so operators alone do not tell."""

    noted: set[int]

    @property
    def _is_hf_initialized(self) -> bool:
        self.noted.add(_storage(self))
        return False


@contextmanager
def _probes(model: nn.Module, noted: set[int]) -> Iterator[None]:
    """Put probes in the place of a meta model's tensors."""
    homes: list[dict[str, Any]] = []
    for module in model.modules():
        homes += [module._parameters, module._buffers]
    before = [dict(home) for home in homes]
    try:
        for home, tensors in zip(homes, before, strict=True):
            for name, tensor in tensors.items():
                if tensor is not None:
                    probe = Tensor._make_subclass(_Probe, tensor.detach())
                    probe.noted = noted
                    home[name] = probe
        yield
    finally:
        for home, tensors in zip(homes, before, strict=True):
            home.update(tensors)


def tensor_names(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; a tensor that has two names is there twice."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model on meta, nothing tied, with what its constructors drew and how it is initialised."""

    model: Any
    draws: tuple[Draw, ...]
    calls: tuple[InitCall, ...]

    @classmethod
    def build(cls, construct: Callable[[], Any]) -> Skeleton:
        """Build a transformers model on meta. Neither the ledger nor a fake mode sees it."""
        from transformers import initialization

        recorder = _Recorder()
        with _disable_current_modes(), torch.random.fork_rng(devices=[]):
            with (
                initialization.no_tie_weights(),
                initialization.meta_device_safe_creation_ops(),
                torch.device("meta"),
                recorder,
            ):
                model = construct()
            calls = _trial_calls(model, _submodels(model, recorder.draws))
        return cls(model=model, draws=tuple(recorder.draws), calls=tuple(calls))

    def events(self) -> Iterator[Draw | InitCall]:
        """Draws and calls in the order in which `from_config` meets them.

        A submodel is initialised at the end of its own constructor: after the last draw on a
        tensor of its own, before its parent's constructor goes on.
        """
        done, draws = 0, self.draws
        by_owner: dict[int, list[InitCall]] = {}
        for call in self.calls:
            by_owner.setdefault(id(call.owner), []).append(call)
        for submodel, end in _submodels(self.model, draws):
            yield from draws[done:end]
            done = max(done, end)
            yield from by_owner.get(id(submodel), [])

    def tree_calls(self) -> list[InitCall]:
        """The calls in the order in which `from_pretrained` fills what a checkpoint lacks."""
        modules = dict.fromkeys(_post_order(self.model))
        order = {id(module): index for index, module in enumerate(modules)}
        return sorted(self.calls, key=lambda call: order[id(call.module)])

    def never_written(self) -> list[str]:
        """Tensors whose value only the constructor knows."""
        written = {name for call in self.calls for name in call.writes}
        names = tensor_names(self.model)
        return [name for name, tensor in names.items() if tensor.numel() and name not in written]


def _post_order(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _post_order(child)
    yield module


def _submodels(model: nn.Module, draws: Sequence[Draw]) -> list[tuple[Any, int]]:
    """Each transformers model inside `model`, itself last, with the number of draws before its
    initialisation."""
    from transformers import PreTrainedModel

    found: list[tuple[Any, int]] = []
    for module in _post_order(model):
        if module is not model and isinstance(module, PreTrainedModel):
            own = {_storage(tensor) for tensor in tensor_names(module).values()}
            last = max((i for i, draw in enumerate(draws) if draw.storages & own), default=-1)
            found.append((module, last + 1))
    return [*sorted(found, key=lambda item: item[1]), (model, len(draws))]


def _trial_calls(model: nn.Module, submodels: list[tuple[Any, int]]) -> list[InitCall]:
    """Run every `_init_weights` on meta and see what it writes."""
    from transformers import PreTrainedModel, initialization

    names: dict[int, list[str]] = {}
    for name, tensor in tensor_names(model).items():
        names.setdefault(_storage(tensor), []).append(name)
    order = {key: index for index, key in enumerate(names)}
    seen: set[int] = set()
    recorder = _Recorder()

    def visit(module: nn.Module, owner: Any, custom: bool) -> Iterator[InitCall]:
        for child in module.children():
            inner = child if isinstance(child, PreTrainedModel) else owner
            yield from visit(child, inner, custom)
        if id(module) in seen:
            return
        seen.add(id(module))
        if custom and not module._parameters and not module._buffers:
            return  # transformers passes over such modules in code that is not its own
        recorder.written.clear()
        owner._init_weights(module)
        keys = sorted(recorder.written & order.keys(), key=order.__getitem__)
        writes = tuple(name for key in keys for name in names[key])
        yield InitCall(owner=owner, module=module, writes=writes)

    with (
        torch.no_grad(),
        initialization.guard_torch_init_functions(),
        _probes(model, recorder.written),
        recorder,
    ):
        return [
            call
            for submodel, _ in submodels
            for call in visit(submodel, submodel, submodel.is_custom_code())
        ]


def initialize(
    events: Sequence[Draw | InitCall],
    slots: TensorSlots,
    *,
    wanted: Collection[str],
    device: torch.device,
) -> None:
    """Run the events; every tensor in `wanted` is materialised, written and placed, in this order.

    Calls that write nothing wanted are left out. Tensors that are not wanted must carry
    transformers' `_is_hf_initialized` mark, which keeps its initialisers off them.
    """
    from transformers import initialization

    last: dict[str, int] = {}
    for index, event in enumerate(events):
        if isinstance(event, InitCall):
            last.update((name, index) for name in event.writes if name in wanted)
    made: set[str] = set()
    with torch.no_grad(), initialization.guard_torch_init_functions():
        for index, event in enumerate(events):
            if isinstance(event, Draw):
                event.repeat(device)
                continue
            writes = [name for name in event.writes if name in last]
            for name in writes:
                if name not in made:
                    slots.materialise(name)
                    made.add(name)
            if writes:
                event.run()
            for name in writes:
                if last[name] == index:
                    slots.place(name)
