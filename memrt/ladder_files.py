"""A side network alone: write it, and put it on its backbone again, in whatever precision that is.

What is in the files says `memrt.ladder.files`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memrt import registry
from memrt.ladder.files import (
    CONFIG_NAME,
    VERSION,
    WEIGHTS_NAME,
    fingerprint,
    side_tensors,
    write_ladder,
)
from memrt.session import Session
from memrt.strategies.ladder import Ladder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from memrt.strategy import Strategy

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "fill_ladder",
    "fingerprint",
    "has_ladder_files",
    "load_ladder",
    "save_ladder",
]


def save_ladder(run: Session, folder: str | Path) -> Path:
    """Write the side network of a session (or of `trainer.session`) into a new or empty folder."""
    from memrt.checkpoint import staged

    settings = _settings(run)
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"folder={str(folder)!r} is taken; name a new or empty folder")
    with staged(target) as staging:
        write_ladder(
            run.model,
            staging,
            settings=settings.to_json(),
            trained=settings.trained_head(run.facts),
        )
    return target


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
        _fill(run, ladder, source, config)
    except BaseException:
        run.detach()
        raise
    return run


def has_ladder_files(folder: str | Path) -> bool:
    """Whether a folder holds a side network alone."""
    return all((Path(folder) / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))


def fill_ladder(run: Session, folder: str | Path) -> None:
    """Load a side network into a session that carries one of the same settings."""
    _fill(run, _settings(run), Path(folder), _config(Path(folder)))


def _settings(run: Session) -> Ladder:
    for strategy in run.strategies:
        if isinstance(strategy, Ladder) and run.attachments:
            return strategy
    raise ValueError("this session carries no ladder; give it the strategy 'ladder'")


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


def _fill(run: Session, ladder: Ladder, source: Path, config: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    trained = ladder.trained_head(run.facts)
    if fingerprint(run.model, trained=trained) != config["backbone"]:
        raise ValueError(
            f"{source} was trained beside another backbone (a {config['model']}) than this "
            f"{type(run.model).__name__}; load the model that it was trained on"
        )
    path = source / WEIGHTS_NAME
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); copy it again"
        ) from error
    here = dict(side_tensors(run.model, set(trained)))
    if saved.keys() != here.keys():
        differing = sorted(saved.keys() ^ here.keys())[0]
        raise ValueError(f"{source} does not fit this model: {differing} is in one of them only")
    with torch.no_grad():
        for name, tensor in here.items():
            if saved[name].shape != tensor.shape:
                raise ValueError(f"{source} does not fit this model: {name} has another shape")
            tensor.copy_(saved[name])
