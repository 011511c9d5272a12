"""The files of a side network: what is in them, and what they know their backbone by.

    ladder.json           version, settings, widths, the backbone's kind and fingerprint
    ladder.safetensors    the side network's tensors, and those of a task head that trained

The fingerprint is a SHA-256 over what every precision keeps: the backbone's embeddings, norms and
biases, rounded to bfloat16. Beside it are sums of them, for a backbone in float16, and of the
blocks' weights, compared within what rounding and packing do (`memrt.base_record`): one pass when a
side network is first written and when one is read. Files of before have none.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from memrt.base_record import (
    Lasting,
    base_hash,
    base_lasting,
    base_weights,
    changed_weight,
    is_base,
)
from memrt.ladder.attach import CHILD
from memrt.weight_sums import checked_sums

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

__all__ = [
    "CONFIG_NAME",
    "VERSION",
    "WEIGHTS_NAME",
    "fill_side",
    "fingerprint",
    "has_ladder_files",
    "read_config",
    "side_tensors",
    "write_ladder",
]

CONFIG_NAME = "ladder.json"
WEIGHTS_NAME = "ladder.safetensors"
VERSION = 1

_sums_beside: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def write_ladder(
    model: nn.Module, folder: Path, *, settings: Mapping[str, Any], trained: Collection[str]
) -> None:
    """Write them into a folder that is there; `trained` names the parameters of the task head."""
    from safetensors.torch import save_file

    config = {
        "version": VERSION,
        "ladder": _without_data(settings),
        "model": type(model).__name__,
        "backbone": fingerprint(model, trained=trained),
        **_sums(model, trained=trained),
    }
    tensors = {name: t.detach().contiguous() for name, t in side_tensors(model, trained)}
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def has_ladder_files(folder: Path) -> bool:
    """Whether a folder holds a side network alone."""
    return all((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))


def read_config(folder: Path) -> dict[str, Any]:
    """`ladder.json`, whole and of a version that is read here."""
    path = folder / CONFIG_NAME
    if folder.is_file():
        raise ValueError(f"folder={str(folder)!r} is a file; name the folder that it lies in")
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG_NAME}; name what save_ladder wrote") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(config, dict):
        raise _damaged(path, f"it holds a {type(config).__name__}, not an object")
    if config.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {config.get('version')!r}, this memrt reads {VERSION}; load it "
            "with the memrt that wrote it"
        )
    for key, kind in (("ladder", dict), ("model", str), ("backbone", str)):
        if not isinstance(config.get(key), kind):
            raise _damaged(path, f"{key!r} is {config.get(key)!r}")
    try:
        checked_sums(config.get("weights", {}))
        _lasting(config)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return config


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged ({what}); copy it again")


def fill_side(model: nn.Module, folder: Path, *, trained: Collection[str]) -> None:
    """Load a side network into one of the same settings, on the backbone it was trained beside."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(folder)
    _require_backbone(model, config, folder, trained=trained)
    path = folder / WEIGHTS_NAME
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); copy it again"
        ) from error
    here = dict(side_tensors(model, set(trained)))
    if saved.keys() != here.keys():
        differing = sorted(saved.keys() ^ here.keys())[0]
        raise ValueError(f"{folder} does not fit this model: {differing} is in one of them only")
    with torch.no_grad():
        for name, tensor in here.items():
            if saved[name].shape != tensor.shape:
                raise ValueError(f"{folder} does not fit this model: {name} has another shape")
            tensor.copy_(saved[name])


def _require_backbone(
    model: nn.Module, config: Mapping[str, Any], folder: Path, *, trained: Collection[str]
) -> None:
    other = (
        f"{folder} was trained beside another backbone (a {config['model']}) than this "
        f"{type(model).__name__}"
    )
    left_out = [*trained, *_side_names(model)]
    if not is_base(model, config["backbone"], _lasting(config), left_out=left_out):
        raise ValueError(f"{other}; load the model that it was trained on")
    weight = changed_weight(model, config.get("weights", {}))
    if weight is not None:
        raise ValueError(
            f"{other}: {weight} differs; load the model that it was trained on (taking 'weights' "
            f"out of {CONFIG_NAME} leaves weights unchecked)"
        )


def _without_data(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings that build the ladder where no data is; the weights come from the file anyway."""
    if settings.get("init") not in ("fisher", "principal"):
        return settings
    return {k: v for k, v in settings.items() if k != "probe_batches"} | {"init": "random"}


def side_tensors(model: nn.Module, trained: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The side network's own parameters and buffers, and those of `trained`."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in model.state_dict():
        if CHILD in name.split(".") or name in trained:
            yield name, tensors[name]


def fingerprint(model: nn.Module, *, trained: Collection[str]) -> str:
    """What a backbone is known by: SHA-256 of embeddings, norms and biases as bfloat16."""
    return base_hash(model, left_out=[*trained, *_side_names(model)])


def _lasting(config: Mapping[str, Any]) -> Lasting:
    return Lasting.from_json(config["lasting"]) if "lasting" in config else Lasting()


def _sums(model: nn.Module, *, trained: Collection[str]) -> dict[str, Any]:
    """Sums of the backbone: looked at once while a side network hangs beside it."""
    side = next(module for name, module in model.named_modules() if CHILD in name.split("."))
    if side not in _sums_beside:
        left_out = {*trained, *_side_names(model)}
        _sums_beside[side] = {
            "weights": base_weights(model, left_out=left_out),
            "lasting": base_lasting(model, left_out=left_out).to_json(),
        }
    return _sums_beside[side]


def _side_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if CHILD in name.split(".")]
