"""The files of a side network: what is in them, and what they know their backbone by.

    ladder.json           version, settings, widths, the backbone's kind and fingerprint
    ladder.safetensors    the side network's tensors, and those of a task head that trained

The fingerprint is a SHA-256 over what every precision keeps: the backbone's embeddings, norms and
biases, rounded to bfloat16. (A float32 checkpoint that is loaded as float16 is rounded twice and
may be taken for another.)
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt.ladder.attach import CHILD

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

__all__ = ["CONFIG_NAME", "VERSION", "WEIGHTS_NAME", "fingerprint", "side_tensors", "write_ladder"]

CONFIG_NAME = "ladder.json"
WEIGHTS_NAME = "ladder.safetensors"
VERSION = 1


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
    }
    tensors = {name: t.detach().contiguous() for name, t in side_tensors(model, trained)}
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    digest = hashlib.sha256()
    for name, parameter in _lasting_parameters(model):
        if name in trained:
            continue
        digest.update(f"{name}{list(parameter.shape)}".encode())
        rounded = parameter.detach().to(torch.bfloat16).contiguous().cpu()
        digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _lasting_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        ours = CHILD in name.split(".")
        lasting = parameter.ndim <= 1 or id(parameter) in embeddings
        if lasting and not ours and parameter.is_floating_point():
            yield name, parameter
