"""Which parameters of a model are its base's own, by the names that they have without adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from memrt.adapters import task_heads

__all__ = [
    "copied_names",
    "embedding_ids",
    "head_names",
    "inner_model",
    "lasting_parameters",
    "lasts",
    "own_parameters",
    "trained_names",
]


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, if it is in one."""
    get = getattr(model, "get_base_model", None)
    inner = model if get is None else get()
    assert isinstance(inner, nn.Module)
    return inner


def lasts(parameter: Tensor, embeddings: Collection[int]) -> bool:
    """Whether every precision keeps it: embeddings, norms and biases, which nothing packs."""
    small = parameter.ndim <= 1 or id(parameter) in embeddings
    return small and parameter.is_floating_point()


def embedding_ids(model: nn.Module) -> set[int]:
    """Parameters of embeddings, by `id`."""
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }


def lasting_parameters(
    model: nn.Module, head: Collection[str] = ()
) -> Iterator[tuple[str, nn.Parameter]]:
    """What lasts of a loaded model, and these parameters of its head, whatever they are."""
    embeddings = embedding_ids(model)
    for name, parameter in own_parameters(model):
        if lasts(parameter, embeddings) or name in head:
            yield name, parameter


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters but those of adapters, by the names that they have without adapters."""
    wrappers = dict(_wrappers(model))
    for name, parameter in model.named_parameters():
        plain = _plain_name(name, wrappers)
        if plain is not None:
            yield plain, parameter


def head_names(model: nn.Module) -> list[str]:
    """Parameters of a task's head."""
    inside = tuple(f"{name}." for name in task_heads(model))
    return [name for name, _ in own_parameters(model) if name.startswith(inside)]


def trained_names(model: nn.Module) -> Iterator[str]:
    """What trains of the base itself."""
    return (name for name, parameter in own_parameters(model) if parameter.requires_grad)


def _wrappers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """PEFT's modules in a model by name, and what in each is the base's own."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        return
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, "base_layer"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield name, "original_module"


def _plain_name(name: str, wrappers: dict[str, str]) -> str | None:
    """A parameter's name in the model without adapters; None for a part of an adapter."""
    parts, plain, at = name.split("."), [], 0
    while at < len(parts):
        plain.append(parts[at])
        own = wrappers.get(".".join(parts[: at + 1]))
        at += 1
        while own is not None:  # one may hold another
            if at >= len(parts) or parts[at] != own:
                return None
            own = wrappers.get(".".join(parts[: at + 1]))
            at += 1
    return ".".join(plain)


def copied_names(model: nn.Module) -> Iterator[str]:
    """Parameters of which PEFT trains a copy, or a part."""
    wrappers = dict(_wrappers(model))
    for name, own in wrappers.items():
        if own == "original_module":
            for part, _ in model.get_submodule(f"{name}.{own}").named_parameters():
                plain = _plain_name(f"{name}.{own}.{part}", wrappers)
                if plain is not None:
                    yield plain
