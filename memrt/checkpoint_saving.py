"""How a run's files are written: the model's in small ones or only a part of it, JSON whole.

transformers' Trainer has no argument for the size of files or for a part of a model, and calls the
model's own `save_pretrained`; so the model is given another one for the time of a save.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from memrt.profiling.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from memrt.strategy import Attachment

__all__ = ["MAX_SHARD_BYTES", "saving", "write_json", "write_text"]

MAX_SHARD_BYTES = 5 * 10**9
"""Of a file of weights."""


@contextmanager
def saving(model: nn.Module, alone: Sequence[Attachment] = ()) -> Iterator[None]:
    """While entered, `model.save_pretrained` writes `alone`, or else the model in small files.

    `alone`: strategies whose tensors can only be written without the model that they belong to.
    Files hold at most `MAX_SHARD_BYTES`: transformers' own bound is 50 GB, which for most models is
    all of it, and what it writes from a device it copies to the host first.
    """
    if not isinstance(model, PreTrainedModel) or "save_pretrained" in vars(model):
        yield
        return
    whole: Callable[..., Any] = partial(model.save_pretrained, max_shard_size=MAX_SHARD_BYTES)
    model.save_pretrained = partial(_write_parts, alone) if alone else whole
    try:
        yield
    finally:
        del model.save_pretrained


def _write_parts(alone: Sequence[Attachment], folder: str | Path, **_: Any) -> None:
    for part in alone:
        part.save_apart(Path(folder))


def write_text(path: Path, text: str) -> None:
    """Write in UTF-8 so that `path` holds the old text or the whole new one."""
    write_whole(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds the old text or the whole new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")
