"""The tensors of the plain model behind a checkpoint or an adapter, made one module at a time.

Files hold either a model's tensors, dense or packed by a strategy, or those of a base model that
adapters belong to. What comes out is dense: packed weights W' = dequantise(codes), adapted ones
W + ΔW (folded in float32, rounded once). Held at a time: one tensor as it is stored and as it is
written; where adapters are folded one module's weights, in float32, and ΔW beside them.

Names are the model's, or the files' own where transformers renames or converts them on loading
(experts saved one by one, say): what comes out loads by the rules that the files load by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt.adapter_folding import fold_layer, tied_weight, trained_copies
from memrt.adapters import adapter_layers, inject, load_adapters, read_adapters
from memrt.base_record import lasting_names, require_base_tensors
from memrt.checkpoint_weights import cast_plan
from memrt.packed_weights import is_conv1d
from memrt.structure import Facts, RunSettings, discover
from memrt.weight_files import assign
from memrt.weight_writer import Entry

if TYPE_CHECKING:
    from pathlib import Path

    from memrt.packed_strategy import PackedStrategy
    from memrt.packed_weights import PackedFormat
    from memrt.weight_files import Assignment, WeightFiles

__all__ = ["PlainWeights", "ScatteredWeightError"]


class ScatteredWeightError(ValueError):
    """An adapted weight that the files hold in parts, such as experts one by one."""


@dataclass(slots=True, kw_only=True)
class _Recipe:
    """How one written tensor is made."""

    entry: Entry
    make: Callable[[], Tensor]


@dataclass(slots=True, kw_only=True)
class PlainWeights:
    """What is to be written, and how each tensor of it is made."""

    files: WeightFiles
    model: Any
    """The model on meta, as its class builds it: nothing tied."""
    packed: Sequence[PackedStrategy] = ()
    """Strategies that keep, or in a run on this base kept, weights packed."""
    adapters: Path | None = None
    adapter_config: Any = None
    dtype: torch.dtype | None = None
    """Of the floating-point tensors that are written; None keeps each as it is stored."""

    num_folded: int = 0
    num_unpacked: int = 0
    notes: list[str] = field(default_factory=list)
    _recipes: dict[str, _Recipe] = field(default_factory=dict)
    _folding: set[str] = field(default_factory=set)
    _waiting: dict[str, Tensor] = field(default_factory=dict)
    _misfits: dict[str, ValueError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        meta = dict(self.model.state_dict(keep_vars=True))
        formats = _formats(self.model, self.packed)
        assignment = assign(self.model, self.files, lambda key, name: self.files.read(key))
        base: dict[str, Callable[[], Tensor]] = {}
        for name, key in assignment.plain.items():
            base[name] = self._source(name, key, meta[name], formats)
        changed = {} if self.adapters is None else self._adapted(base)
        for misfit in (error for name, error in self._misfits.items() if name not in changed):
            raise misfit
        self._refuse(changed, base, formats, assignment)
        provided = assignment.provided | changed.keys()
        self._settle(meta.keys() - provided, assignment.unexpected)
        target = cast_plan(self.model, self.dtype) if self.dtype is not None else None
        for name, tensor in meta.items():
            if name not in base and name not in changed:
                continue
            make = changed.get(name) or base[name]
            stored = assignment.plain.get(name)
            own = tensor.dtype if stored is None else self.files.stored_dtype(stored)
            if not own.is_floating_point and tensor.is_floating_point():  # packed
                own = tensor.dtype
            self._add(
                self._written_name(name, stored), name, tuple(tensor.shape), own, target, make
            )
        for name, keys in assignment.converted_keys.items():
            for key in keys:
                make = partial(self.files.read, key)
                shape, own = self.files.shape(key), self.files.stored_dtype(key)
                self._add(key, name, shape, own, target, make)

    @property
    def entries(self) -> list[Entry]:
        """Everything that is to be written, in the model's order."""
        return [recipe.entry for recipe in self._recipes.values()]

    @property
    def common_dtype(self) -> torch.dtype:
        """The dtype of most of the written floating-point bytes."""
        totals: dict[torch.dtype, int] = {}
        for entry in self.entries:
            if entry.dtype.is_floating_point:
                totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.num_bytes
        return max(totals, key=lambda dtype: totals[dtype])

    def tensor(self, name: str) -> Tensor:
        """Make one tensor."""
        recipe = self._recipes[name]
        return recipe.make().to(recipe.entry.dtype)

    # ------------------------------------------------------------ where tensors come from

    def _source(
        self, name: str, key: str, meta: Tensor, formats: Mapping[str, tuple[PackedFormat, int]]
    ) -> Callable[[], Tensor]:
        """The dense tensor of a model that has no adapters."""
        shape, stored = self.files.shape(key), self.files.stored_dtype(key)
        form, axis = formats.get(name, (None, 0))
        wanted = tuple(meta.shape)
        if form is not None and not stored.is_floating_point:
            self.num_unpacked += 1
            dense = form.dense
            return lambda: _checked(
                lambda: dense(self.files.read(key), wanted, axis, meta.dtype), self.files, key
            )
        if shape != wanted or stored.is_floating_point != meta.is_floating_point():
            # a base's own head, where the adapters bring one with other labels
            self._misfits[name] = ValueError(
                f"{self.files.path(key)}: {key!r} is {stored} {list(shape)}, the config makes it "
                f"{meta.dtype} {list(wanted)}; name the folder that both were saved to"
            )
            return partial(self.files.read, key)
        if form is None or self.adapters is None:  # a run saves what it packed as it is
            return partial(self.files.read, key)
        self.num_unpacked += 1
        return lambda: _rounded(form, self.files.read(key).to(meta.dtype), axis)

    def _adapted(self, base: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
        """What adapters change: folded weights, and copies that were trained whole."""
        assert self.adapters is not None
        names = {id(module): name for name, module in self.model.named_modules()}
        lasting = lasting_names(self.model, self.adapters)
        _stand_in(self.model)
        inject(self.adapter_config, self.model)
        state = read_adapters(self.adapters)
        self._take_base(state, base)
        remedy = "name the base that they were trained on"
        load_adapters(self.model, self.adapters, state=state, remedy=remedy)
        where = str(self.files.path(next(iter(self.files))).parent)
        packed = bool(self.packed)
        if not require_base_tensors(lasting, base, self.adapters, base=where, packed=packed):
            self.notes.append("whether this is the base of the adapters cannot be told from files")
        changed: dict[str, Callable[[], Tensor]] = {}
        for _, layer in adapter_layers(self.model):
            module = layer.get_base_layer()
            name = names[id(module)]
            own = [f"{name}.{part}" for part, _ in module.named_parameters(recurse=False)]
            self._folding.update(own)
            self.num_folded += 1
            changed.update({each: partial(self._folded, each, layer, name, base) for each in own})
        for name, tensor in trained_copies(self.model).items():
            changed[name] = partial(_value, tensor)
        return changed

    def _take_base(self, state: dict[str, Tensor], base: dict[str, Callable[[], Tensor]]) -> None:
        """PEFT writes embeddings that carry an adapter, the head, and biases that trained."""
        here = self.model.state_dict(keep_vars=True)
        for name in [name for name in state if name in here]:
            tensor, plain = state.pop(name), name.replace(".base_layer.", ".")
            if tensor.shape != here[name].shape:
                raise ValueError(
                    f"{self.adapters}: {name!r} has shape {list(tensor.shape)}, the base's config "
                    f"makes it {list(here[name].shape)}; resize the base's embeddings and save it"
                )
            base[plain] = partial(_value, tensor)
            here[name].requires_grad_(False)  # nothing of it is left to load

    def _folded(
        self, name: str, layer: Any, module_name: str, base: Mapping[str, Callable[[], Tensor]]
    ) -> Tensor:
        """One tensor of an adapted module; its others wait until they are asked for."""
        if name in self._waiting:
            return self._waiting.pop(name)
        module = layer.get_base_layer()
        blanks = dict(module._parameters)
        for part, blank in blanks.items():
            if blank is not None:
                value = base[f"{module_name}.{part}"]().float()
                module._parameters[part] = nn.Parameter(value, requires_grad=False)
                del value
        fold_layer(module_name, layer)
        for part, blank in blanks.items():
            if blank is not None:
                self._waiting[f"{module_name}.{part}"] = module._parameters[part].detach()
        module._parameters.update(blanks)
        return self._waiting.pop(name)

    # ------------------------------------------------------------ what cannot be

    def _refuse(
        self,
        changed: Mapping[str, Callable[[], Tensor]],
        base: Mapping[str, Any],
        formats: Mapping[str, Any],
        assignment: Assignment,
    ) -> None:
        ties: Mapping[str, str] = self.model.all_tied_weights_keys
        for name in changed:
            group = {name, ties.get(name), *(a for a, leader in ties.items() if leader == name)}
            others = sorted(each for each in group - {name} if each is not None)
            if others:
                raise tied_weight(name, others[0])
        for name in [*(assignment.converted.keys() & formats.keys()), *self._apart(changed, base)]:
            scattered = self.adapters is not None and name in assignment.provided
            kind = ScatteredWeightError if scattered else ValueError
            raise kind(
                f"{name} was packed or adapted, but the files do not hold it as one tensor; load "
                "the model with its strategies and call memrt.export.export_run"
            )

    def _apart(self, changed: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
        """Adapted weights that nothing can be folded into."""
        return [name for name in changed if name in self._folding and name not in base]

    def _settle(self, missing: set[str], unexpected: set[str]) -> None:
        """Refuse a model that lacks weights; note what is left out."""
        kind = type(self.model).__name__
        found = SimpleNamespace(
            missing_keys=missing - self.model.all_tied_weights_keys.keys(),
            unexpected_keys=set(unexpected),
        )
        self.model._adjust_missing_and_unexpected_keys(found)
        if found.missing_keys:
            first = min(found.missing_keys)
            raise ValueError(
                f"{kind} needs {first!r}"
                + (f" and {len(found.missing_keys) - 1} more" * (len(found.missing_keys) > 1))
                + ", which neither the files nor the adapters hold; name the model that was trained"
            )
        if found.unexpected_keys:
            first = min(found.unexpected_keys)
            self.notes.append(
                f"{len(found.unexpected_keys)} tensors that {kind} does not have were left out "
                f"(such as {first})"
            )

    # ------------------------------------------------------------ what is written

    def _add(
        self,
        written: str,
        name: str,
        shape: tuple[int, ...],
        own: torch.dtype,
        target: Callable[[str, torch.dtype], torch.dtype] | None,
        make: Callable[[], Tensor],
    ) -> None:
        dtype = own
        if target is not None and self.dtype is not None and own.is_floating_point:
            dtype = target(name, self.dtype)
        entry = Entry(name=written, shape=shape, dtype=dtype)
        self._recipes[written] = _Recipe(entry=entry, make=make)

    def _written_name(self, name: str, key: str | None) -> str:
        """The file's name, but with the base model's prefix as the whole model has it."""
        prefix = f"{self.model.base_model_prefix}."
        if key is None or key.removeprefix(prefix) == name.removeprefix(prefix):
            return name
        return key


def _formats(
    model: Any, strategies: Sequence[PackedStrategy]
) -> dict[str, tuple[PackedFormat, int]]:
    """Weights that the strategies pack: their format, and the axis that counts outputs."""
    facts = Facts(model=model, structure=discover(model), settings=RunSettings())
    return {
        f"{name}.weight": (strategy.packed_format, int(is_conv1d(model.get_submodule(name))))
        for strategy in strategies
        for name in strategy.targets(facts)
    }


def _rounded(form: PackedFormat, weight: Tensor, axis: int) -> Tensor:
    """A weight as it was while it was packed."""
    shape, dtype = tuple(weight.shape), weight.dtype
    packed = form.pack(weight, axis)
    del weight
    return form.dense(packed, shape, axis, dtype)


def _checked(make: Callable[[], Tensor], files: WeightFiles, key: str) -> Tensor:
    try:
        return make()
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{files.path(key)}: {key!r} holds no packed weight of its shape ({error}); "
            "copy or download the file again"
        ) from error


def _value(tensor: Tensor) -> Tensor:
    return tensor


def _stand_in(model: nn.Module) -> None:
    """Tensors with the shapes of a meta model's and the bytes of one number: PEFT puts an adapter
    on the device of the layer that it goes to, and looks at nothing else of it."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                blank = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(blank, requires_grad=False)
