"""A side network alone: write it, and put it on its backbone again, in whatever precision that is.

What is in the files says `memrt.ladder.files`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from memrt import registry
from memrt.ladder.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    fill_side,
    fingerprint,
    read_config,
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
    "fingerprint",
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
    saved = _saved_settings(source)
    # the file has every weight: to cut first ones out of the backbone would be for nothing
    plain = replace(saved, init="random", probe_batches=8)
    run = Session(model, registry.parse_all([*strategies, plain]))
    try:
        fill_side(model, source, trained=saved.trained_head(run.facts))
    except BaseException:
        run.detach()
        raise
    _note_settings(run, plain, saved)
    return run


def _saved_settings(folder: Path) -> Ladder:
    """Those that the side network was built with."""
    values = read_config(folder)["ladder"]
    path = folder / CONFIG_NAME
    try:
        found = registry.from_json(values)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: its settings build no ladder ({error}); copy it again, or load it with the "
            "memrt that wrote it"
        ) from error
    if not isinstance(found, Ladder):
        raise ValueError(
            f"{path} has settings of {found.name!r}, not of a ladder; name what save_ladder wrote"
        )
    return found


def _note_settings(run: Session, plain: Ladder, saved: Ladder) -> None:
    """What is saved again says how the side network began, not how it was loaded."""
    run.strategies = [saved if each is plain else each for each in run.strategies]
    for attachment in run.attachments:
        if attachment.settings is plain:
            attachment.settings = saved


def _settings(run: Session) -> Ladder:
    for strategy in run.strategies:
        if isinstance(strategy, Ladder) and run.attachments:
            return strategy
    raise ValueError("this session carries no ladder; give it the strategy 'ladder'")
