"""PEFT's adapters in a model: put in, found, taken out, saved and loaded.

The adapters go into the model itself, as transformers' `add_adapter` does it, so that the model
stays the object that it was. `save_pretrained` of a transformers model then writes PEFT's layout.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from memrt.adapter_methods import reads_base_weights
from memrt.adapter_reach import adapter_layers, refuse_passed_by
from memrt.adapter_starts import Taken, give_back, parts_taken, weights_at_risk
from memrt.profiling.fake import is_fake
from memrt.structure import discover

__all__ = [
    "ADAPTER_NAME",
    "Injection",
    "adapter_layers",
    "changed_values",
    "check_targets",
    "has_adapter_files",
    "inject",
    "load_adapters",
    "plain",
    "read_adapters",
    "reads_base_weights",
    "remove_adapters",
    "saved_modules",
    "task_heads",
]

ADAPTER_NAME = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """What a model was before adapters were put in."""

    modules: Mapping[str, nn.Module]
    children: tuple[tuple[nn.Module, frozenset[str]], ...]
    attributes: frozenset[str]
    taken: tuple[Taken, ...] = ()
    """What the adapters' start took out of the weights."""

    @classmethod
    def of(cls, model: nn.Module) -> Injection:
        """Remember a model."""
        return cls(
            modules=dict(model.named_modules()),
            children=tuple((module, frozenset(module._modules)) for module in model.modules()),
            attributes=frozenset(vars(model)),
        )


def plain(value: Any) -> Any:
    """A configuration's values as JSON has them."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def changed_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a PEFT configuration's dict has that PEFT's default has not, as JSON has it."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = plain(config["peft_type"])
    default: dict[str, Any] = {}
    with suppress(TypeError, ValueError, ImportError):  # AdaLoRA and others have no default
        default = plain(PEFT_TYPE_TO_CONFIG_MAPPING[kind]().to_dict())
    values = {k: v for k, v in plain(config).items() if k not in default or v != default[k]}
    return {**values, "peft_type": kind}


def saved_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that PEFT trains whole beside the adapters (`modules_to_save`), by name."""
    from peft.utils import ModulesToSaveWrapper

    return [(n, m) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]


def task_heads(model: nn.Module) -> list[str]:
    """Modules that a task puts on a model's body, by name; none where a language-model head is.

    Those behind the body, and what of the body they alone read, its pooler: a body that was trained
    without the task has none of them, and each load draws them anew.
    """
    structure = discover(model)
    body = structure.body
    if structure.head is not None or body is None:
        return []
    heads = [
        n for n in _behind(model, {body}) if any(True for _ in model.get_submodule(n).parameters())
    ]
    inner = model.get_submodule(body)
    layered = {
        child
        for child, _ in inner.named_children()
        if any(f"{stack.name}.".startswith(f"{body}.{child}.") for stack in structure.stacks)
    }
    poolers = [
        f"{body}.{child}"
        for child in _behind(inner, layered)
        if any(isinstance(part, nn.Linear) for part in inner.get_submodule(child).modules())
    ]
    return [*poolers, *heads] if heads else []


def _behind(parent: nn.Module, children: set[str]) -> list[str]:
    """Children of a module that are registered after one of these."""
    names = [name for name, _ in parent.named_children()]
    first = min((names.index(name) for name in children), default=len(names))
    return [name for name in names[first:] if name not in children]


def inject(config: Any, model: nn.Module, *, on_meta: bool = False) -> Injection:
    """Put adapters into a model; only they train. `ValueError` with PEFT's reason if it refuses."""
    from peft import inject_adapter_in_model
    from peft.functional import cast_adapter_dtype

    before = Injection.of(model)
    fake = any(is_fake(parameter) for parameter in model.parameters())
    refused: tuple[type[Exception], ...] = (ValueError, TypeError, NotImplementedError)
    if fake:
        refused += (RuntimeError,)  # what reads the values of weights
    config.base_model_name_or_path = vars(model).get("name_or_path")
    blanks = _blanked(model, getattr(config, "modules_to_save", None) or ()) if fake else []
    weights = {} if fake or on_meta else weights_at_risk(config, model)
    try:
        with warnings.catch_warnings(), torch.device("meta") if fake else nullcontext():
            # PEFT sets this one by itself, for each kind of layer, and says so
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            inject_adapter_in_model(
                config, model, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=on_meta
            )
    except refused as error:
        _unblank(blanks)
        remove_adapters(model, _noted(before, config, model, weights))
        where = "a planned " if fake else ""
        raise ValueError(
            f"PEFT cannot put {config.peft_type.value} into {where}{type(model).__name__}: {error}"
        ) from error
    except BaseException:  # out of memory halfway, say
        _unblank(blanks)
        remove_adapters(model, _noted(before, config, model, weights))
        raise
    if fake:
        _unblank(blanks)
        _make_fake_adapters(model)
        _make_fake_copies(model)
    elif not on_meta:
        cast_adapter_dtype(model, ADAPTER_NAME)  # to fp32, as PEFT's own wrapper does
    if hasattr(model, "save_pretrained"):
        vars(model)["_hf_peft_config_loaded"] = True  # save_pretrained writes PEFT's layout
    return _noted(before, config, model, weights)


def _noted(
    before: Injection, config: Any, model: nn.Module, weights: dict[nn.Module, Tensor]
) -> Injection:
    """With what the start took out of the weights; on meta and of fake tensors it took nothing."""
    if any(p.device.type == "meta" or is_fake(p) for p in model.parameters()):
        return before
    taken = parts_taken(config, model, weights, adapter=ADAPTER_NAME)
    return replace(before, taken=taken)


_Blank: TypeAlias = tuple[dict[str, Any], str, Tensor]


def _blanked(model: nn.Module, names: Collection[str]) -> list[_Blank]:
    """Put tensors on meta in the place of fake ones in modules that PEFT will copy.

    A copy of a fake tensor copies the mode that it is of, with all that the mode has seen.
    """
    found: list[_Blank] = []
    for key, module in model.named_modules():
        if not any(key.endswith(name) for name in names):
            continue
        for part in module.modules():
            for slots in (part._parameters, part._buffers):
                for name, tensor in slots.items():
                    if tensor is not None and is_fake(tensor):
                        found.append((slots, name, tensor))
                        with unset_fake_temporarily():
                            blank = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                        slots[name] = _of_kind(tensor, blank)
    return found


def _of_kind(kind: Tensor, tensor: Tensor) -> Tensor:
    is_parameter = isinstance(kind, nn.Parameter)
    return nn.Parameter(tensor, kind.requires_grad) if is_parameter else tensor


def _unblank(blanks: list[_Blank]) -> None:
    for slots, name, tensor in blanks:
        tensor.requires_grad_(slots[name].requires_grad)
        slots[name] = tensor


@torch.no_grad()
def _make_fake_copies(model: nn.Module) -> None:
    """Give copies of modules, made on meta, fake tensors like those of the modules."""
    for _, module in saved_modules(model):
        copied = module.modules_to_save[ADAPTER_NAME]
        for own, part in zip(module.original_module.modules(), copied.modules(), strict=True):
            for kind in ("_parameters", "_buffers"):
                slots, wanted = getattr(part, kind), getattr(own, kind)
                for name, blank in slots.items():
                    if blank is not None and blank.device.type == "meta":
                        made = torch.empty_like(wanted[name])
                        slots[name] = _of_kind(blank, made)


@torch.no_grad()
def _make_fake_adapters(model: nn.Module) -> None:
    """Give adapters on meta the fake tensors that PEFT would have made, with its detours.

    PEFT moves each new adapter to the base's dtype, and all of them to fp32 in the end. It does so
    through `Module.to`, which cannot replace a fake parameter.
    """
    made: list[tuple[nn.Module, str, Tensor]] = []
    for _, layer in adapter_layers(model):
        found = [
            (module, name, torch.empty(p.shape, dtype=p.dtype, device=_device(model)))
            for module in layer.modules()
            for name, p in module._parameters.items()
            if p is not None and p.device.type == "meta"
        ]
        weight = getattr(layer.get_base_layer(), "weight", None)
        for index, (module, name, tensor) in enumerate(found):
            if isinstance(weight, Tensor) and weight.is_floating_point():
                found[index] = (module, name, tensor.to(weight.dtype))
                del tensor
        made += found
        found.clear()
    while made:
        module, name, tensor = made.pop(0)
        narrow = tensor.dtype in (torch.bfloat16, torch.float16)
        trains = module._parameters[name].requires_grad  # type: ignore[union-attr]
        module._parameters[name] = nn.Parameter(tensor.float() if narrow else tensor, trains)


def _device(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters() if p.device.type != "meta")


def check_targets(config: Any, model: nn.Module) -> None:
    """Let PEFT refuse a model by putting adapters into a copy of it on meta."""
    parameters = [*model.parameters(), *model.buffers()]
    if any(is_fake(tensor) for tensor in parameters):
        return  # nothing is lost when a planned model is refused later
    memo: dict[int, Any] = {}
    for tensor in parameters:
        blank = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = _of_kind(tensor, blank)
    copied = copy.deepcopy(model, memo)
    own = {id(tensor) for tensor in copied.state_dict(keep_vars=True).values()}
    named = getattr(config, "target_modules", None) != "all-linear"  # PEFT puts names there
    with torch.random.fork_rng(devices=[]):  # PEFT draws adapters of embeddings all the same
        inject(config, copied, on_meta=True)
    _refuse_shared(config, copied, own)
    if named:
        refuse_passed_by(copied)


def _refuse_shared(config: Any, model: nn.Module, own: set[int]) -> None:
    """One tensor in several layers' adapters: transformers saves a tensor under one name only."""
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first != name and id(tensor) not in own:
            raise ValueError(
                f"PEFT's {config.peft_type.value} shares tensors between layers ({first} is {name})"
                ", which transformers cannot save; train peft.get_peft_model(model, config) "
                "without this strategy, or use method='lora'"
            )


def remove_adapters(model: nn.Module, before: Injection) -> None:
    """Put every module back where it was, and into the weights what a start took out of them."""
    give_back(before.taken)
    for name, module in before.modules.items():
        if name:
            parent_name, _, attribute = name.rpartition(".")
            before.modules[parent_name]._modules[attribute] = module
    for module, children in before.children:
        for extra in module._modules.keys() - children:
            del module._modules[extra]
    for attribute in vars(model).keys() - before.attributes:
        if attribute in ("peft_config", "_hf_peft_config_loaded"):
            del vars(model)[attribute]


# ---------------------------------------------------------------- files


def has_adapter_files(folder: str | Path) -> bool:
    """Whether a checkpoint folder holds adapters in PEFT's layout."""
    return (Path(folder) / "adapter_model.safetensors").is_file()


def read_adapters(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's adapters, by PEFT's names without its wrapper's prefix."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / "adapter_model.safetensors"
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); copy it again"
        ) from error
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


def load_adapters(
    model: nn.Module,
    folder: str | Path,
    *,
    state: dict[str, Tensor] | None = None,
    remedy: str = "resume with what wrote it",
) -> None:
    """Load the adapters of a checkpoint into a model that has such adapters.

    `state`: what `read_adapters` gave, or the part of it that is to be loaded.
    """
    from peft import set_peft_model_state_dict

    wrong = f"{folder} holds adapters of another model or method; {remedy}"
    try:
        result = set_peft_model_state_dict(
            model,
            read_adapters(folder) if state is None else state,
            adapter_name=ADAPTER_NAME,
        )
    except RuntimeError as error:  # shapes
        raise ValueError(f"{wrong} ({str(error).splitlines()[-1].strip()})") from error
    except KeyError as error:  # a module that was trained whole
        raise ValueError(f"{wrong} ({error} is not in it)") from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    odd = [*(name for name in result.missing_keys if name in trained), *result.unexpected_keys]
    if odd:
        raise ValueError(f"{wrong} ({odd[0]} and {len(odd) - 1} more do not fit)")
