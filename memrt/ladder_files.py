"""A side network alone: write it, and put it on its backbone again, in whatever precision that is.

    folder/
        ladder.json           version, settings, widths, the backbone's kind and fingerprint
        ladder.safetensors    the side network's tensors, and those of a task head that trained

The fingerprint is a SHA-256 over what every precision keeps: the backbone's embeddings, norms and
biases, rounded to bfloat16. (A float32 checkpoint that is loaded as float16 is rounded twice and
may be taken for another.)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt import registry
from memrt.ladder.attach import CHILD
from memrt.session import Session
from memrt.strategies.ladder import Ladder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from memrt.strategy import Strategy

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "fingerprint",
    "load_ladder",
    "save_ladder",
    "write_ladder",
]

CONFIG_NAME = "ladder.json"
WEIGHTS_NAME = "ladder.safetensors"
VERSION = 1


def save_ladder(run: Session, folder: str | Path) -> Path:
    """Write the side network of a session (or of `trainer.session`) into a new or empty folder."""
    from memrt.checkpoint import staged

    _settings(run)
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"folder={str(folder)!r} is taken; name a new or empty folder")
    with staged(target) as staging:
        write_ladder(run, staging)
    return target


def write_ladder(run: Session, folder: Path) -> None:
    """The files of a side network, into a folder that is there."""
    from safetensors.torch import save_file

    from memrt.checkpoint import write_json

    settings = _settings(run)
    config = {
        "version": VERSION,
        "ladder": settings.to_json(),
        "model": type(run.model).__name__,
        "backbone": fingerprint(run.model, trained=settings.trained_head(run.facts)),
    }
    tensors = {name: t.detach().contiguous() for name, t in _side_tensors(run, settings)}
    save_file(tensors, folder / WEIGHTS_NAME)
    write_json(folder / CONFIG_NAME, config)


def load_ladder(
    model: nn.Module,
    folder: str | Path,
    *,
    strategies: Sequence[str | Strategy | Mapping[str, Any]] = (),
) -> Session:
    """Put a saved side network on its backbone; no trainer is needed to run the model then.

    `strategies` are what the backbone carries beside it, such as "nf4". Returns the session, whose
    `detach()` takes the side network off again.
    """
    source = Path(folder)
    config = _config(source)
    ladder = registry.from_json(config["ladder"])
    assert isinstance(ladder, Ladder)
    run = Session(model, registry.parse_all([*strategies, ladder]))
    try:
        found = fingerprint(model, trained=ladder.trained_head(run.facts))
        if found != config["backbone"]:
            raise ValueError(
                f"{source} was trained beside another backbone (a {config['model']}) than this "
                f"{type(model).__name__}; load the model that it was trained on"
            )
        _fill(run, ladder, source)
    except BaseException:
        run.detach()
        raise
    return run


def fingerprint(model: nn.Module, *, trained: list[str]) -> str:
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


def _settings(run: Session) -> Ladder:
    for strategy in run.strategies:
        if isinstance(strategy, Ladder) and run.attachments:
            return strategy
    raise ValueError("this session carries no ladder; give it the strategy 'ladder'")


def _side_tensors(run: Session, ladder: Ladder) -> Iterator[tuple[str, Tensor]]:
    trained = set(ladder.trained_head(run.facts))
    tensors = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}
    for name in run.model.state_dict():
        if CHILD in name.split(".") or name in trained:
            yield name, tensors[name]


def _config(source: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((source / CONFIG_NAME).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{source} has no {CONFIG_NAME}; name what save_ladder wrote") from None
    if config.get("version") != VERSION:
        raise ValueError(
            f"{source} has version {config.get('version')!r}, this memrt reads {VERSION}; load it "
            "with the memrt that wrote it"
        )
    return config


def _fill(run: Session, ladder: Ladder, source: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(source / WEIGHTS_NAME)
    here = dict(_side_tensors(run, ladder))
    if saved.keys() != here.keys():
        differing = sorted(saved.keys() ^ here.keys())[0]
        raise ValueError(f"{source} does not fit this model: {differing} is in one of them only")
    with torch.no_grad():
        for name, tensor in here.items():
            if saved[name].shape != tensor.shape:
                raise ValueError(f"{source} does not fit this model: {name} has another shape")
            tensor.copy_(saved[name])
