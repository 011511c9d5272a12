"""The weights of a checkpoint, copied into a model that is there, one tensor at a time.

And whether the rest of it is whole, asked before anything is loaded.

transformers' Trainer reads a whole file into host memory first, and copies by name alone: experts
that are saved one by one and fused in the model (Mixtral, since transformers 5) find no name, and
the run goes on with the experts that it began with. Here names follow the rules of
`from_pretrained`, and what is left without a value is an error.

Host memory: the largest tensor; where parts are fused, twice the fused tensor.
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from memrt.model_source import weight_source
from memrt.weight_files import WeightFiles, assign

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

__all__ = [
    "TRAINER_STATE_NAME",
    "damage",
    "has_weight_files",
    "lacking",
    "load_weights",
    "read_trainer_state",
    "require_readable",
]

TRAINER_STATE_NAME = "trainer_state.json"

_NEEDED = {
    "optimizer.pt": "optimizer.pt",
    "scheduler.pt": "scheduler.pt",
    "rng_state.pth": "rng_state*.pth",
}
"""Files, and the names that they may have (a process may have its own). Without one of them
transformers begins with a new optimizer or draws other numbers, and says nothing."""


def read_trainer_state(folder: Path) -> TrainerState:
    """Step, history and intervals; `ValueError` where they cannot be read."""
    path = folder / TRAINER_STATE_NAME
    try:
        return TrainerState.load_from_json(str(path))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    except TypeError as error:
        raise ValueError(f"{path} is damaged, or of another transformers ({error})") from error


def damage(folder: Path) -> Iterator[str]:
    """What of a checkpoint beside its weights is cut or cannot be read; reads headers only."""
    for path in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        if not zipfile.is_zipfile(path):
            yield f"{path} is damaged (it is no file that torch.save wrote whole)"
    try:
        read_trainer_state(folder)
    except ValueError as error:
        yield str(error)


def require_readable(folder: Path, *, exact: bool) -> None:
    """Refuse a checkpoint that is damaged, or, where a run must go on exactly, not whole."""
    problems = list(damage(folder))
    if exact:
        problems += [f"{folder} lacks {name}" for name in lacking(folder)]
    if problems:
        raise ValueError(f"{problems[0]}; resume from another checkpoint")


def lacking(folder: Path) -> list[str]:
    """Files beside the weights without which a run cannot go on as if it had never stopped."""
    return [name for name, names in _NEEDED.items() if not any(folder.glob(names))]


def has_weight_files(folder: Path) -> bool:
    """Whether a checkpoint holds a whole model in safetensors."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy every tensor of the checkpoint in `folder` into `model`.

    Raises `ValueError` for a damaged file, a tensor of another shape, one that the model does not
    have, and one that the model has and the checkpoint has not.
    """
    source = weight_source(folder, getattr(model, "config", None))
    if source is None:
        raise ValueError(f"{folder} holds no weights; resume from another checkpoint")
    with WeightFiles(source) as files, torch.no_grad():
        state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        direct = [key for key in files if key in state]
        for key in direct:
            _copy(state, key, files.read(key), folder)
        others = [key for key in files if key not in state]
        renamed = _load_renamed(model, files, others, state, folder) if others else set()
    _refuse_missing(model, state, {*direct, *renamed}, folder)


def _load_renamed(
    model: nn.Module,
    files: WeightFiles,
    keys: Collection[str],
    state: Mapping[str, Tensor],
    folder: Path,
) -> set[str]:
    """Tensors that the files hold under other names, or in parts; the names that they fill."""
    if not isinstance(model, PreTrainedModel):
        raise _unknown(model, keys, folder)
    found = assign(model, keys, lambda key, _: files.read(key))
    if found.unexpected:
        raise _unknown(model, found.unexpected, folder)
    filled = set(found.plain)
    for name, key in found.plain.items():
        _copy(state, name, files.read(key), folder)
    for name, rule in found.converted.items():
        parts: dict[str, Any] = rule.convert(name, model=model, config=model.config)
        for part in list(parts):
            value = parts.pop(part)
            _copy(state, part, value[0] if isinstance(value, list) else value, folder)
            filled.add(part)
    return filled


def _copy(state: Mapping[str, Tensor], name: str, value: Tensor, folder: Path) -> None:
    target = state[name]
    if target.shape != value.shape:
        raise ValueError(
            f"{folder}: {name!r} has shape {list(value.shape)}, the model's has "
            f"{list(target.shape)}; resume with the model that the checkpoint was written with"
        )
    target.copy_(value)


def _unknown(model: nn.Module, names: Collection[str], folder: Path) -> ValueError:
    return ValueError(
        f"{folder} holds {_listed(names)}, which {type(model).__name__} does not have; resume with "
        "the model that the checkpoint was written with"
    )


def _refuse_missing(
    model: nn.Module, state: Mapping[str, Tensor], filled: Collection[str], folder: Path
) -> None:
    """A tied weight is saved under one of its names, and some models leave out what they tie."""
    memory = {_place(state[name]) for name in filled}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    missing = [n for n, t in state.items() if n not in left_out and _place(t) not in memory]
    if missing:
        raise ValueError(
            f"{folder} lacks {_listed(missing)} of {type(model).__name__}; resume from another "
            "checkpoint, or with the model that this one was written with"
        )
    if left_out and isinstance(model, PreTrainedModel):
        model.tie_weights()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape


def _listed(names: Collection[str], limit: int = 4) -> str:
    shown = ", ".join(map(repr, sorted(names)[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
