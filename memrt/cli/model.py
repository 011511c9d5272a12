"""The model that a command was given: its config, and how to load it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from memrt.cli.progress import Progress
    from memrt.strategy import Strategy

__all__ = ["Model", "quiet_hub"]

_LANGUAGE_MODELS = ("causal-lm", "masked-lm", "seq2seq-lm")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Inside, the Hub's client does not report its retries: what fails in the end is raised."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    level = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model that a command was given."""

    source: Any
    """What `memrt.load` takes: a path, a hub id, or the embedded config."""
    config: Any
    name: str
    has_weights: bool
    dtype: torch.dtype
    trusted: bool = False
    """Whether Python code that the model brings may run."""

    @classmethod
    def resolve(cls, arguments: argparse.Namespace, progress: Progress) -> Model:
        """From `--model` and `--dtype`; refuses what is no language model."""
        from memrt.embedded import MODEL_NAME, embedded_config
        from memrt.model_source import weight_source

        source = embedded_config() if arguments.model is None else arguments.model
        name = MODEL_NAME if arguments.model is None else str(arguments.model)
        if arguments.model is not None and not Path(name).exists():
            progress.say(f"{name} is no local path: asking the Hugging Face Hub")
        trusted = arguments.trust_remote_code
        config = _config(source, trusted)
        _require_language_model(config, name, trusted)
        limit = getattr(config, "max_position_embeddings", None)
        if isinstance(limit, int) and arguments.sequence_length > limit:
            raise ValueError(
                f"--seq {arguments.sequence_length}: {name} has positions for {limit} tokens "
                "(config.max_position_embeddings); lower --seq"
            )
        return cls(
            source=source,
            config=config,
            name=name,
            has_weights=weight_source(source, config) is not None,
            dtype=_dtype(arguments.dtype, config, name),
            trusted=trusted,
        )

    def load(self, strategies: Sequence[Strategy], device: torch.device) -> nn.Module:
        """The model with its weights, random ones where the source has none."""
        from memrt.loading import load

        return load(
            self.source,
            strategies,
            dtype=self.dtype,
            device=device,
            trust_remote_code=self.trusted,
        )

    def load_fake(self) -> nn.Module:
        """Its shapes alone; inside `memrt.profiling.fake.fake_tensors()`."""
        from memrt.loading import load

        return load(self.config, [], dtype=self.dtype, trust_remote_code=self.trusted)


def _dtype(text: str, config: Any, name: str) -> torch.dtype:
    """`--dtype`; auto is the config's, as in transformers, and float32 where it names none."""
    found = (getattr(config, "dtype", None) or "float32") if text == "auto" else text
    dtype = getattr(torch, found) if isinstance(found, str) else found
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"--dtype auto: the config of {name} says {dtype}, which needs loss scaling to train; "
            "pass --dtype bfloat16 or --dtype float32"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


def _config(source: Any, trusted: bool) -> Any:
    from memrt.model_source import resolve_config

    try:
        with quiet_hub():
            return resolve_config(source, trust_remote_code=trusted)
    except ValueError as error:
        raise ValueError(_as_flag(error)) from error


def _as_flag(text: object) -> str:
    return str(text).replace("trust_remote_code=True", "--trust-remote-code")


def _require_language_model(config: Any, name: str, trusted: bool) -> None:
    from memrt.model_source import TASKS, auto_class, brings_code

    auto = auto_class(config)
    problem = None if trusted else brings_code(config, auto)
    if problem is not None:
        raise ValueError(f"{name}: {_as_flag(problem)}")
    task = {each: task for task, each in TASKS.items()}[auto.__name__]
    if task not in _LANGUAGE_MODELS or not hasattr(config, "vocab_size"):
        raise ValueError(
            f"{name} is for {task}; the command line trains language models on text (memrt train "
            "also classifiers), others go through memrt.plan and memrt.prepare in Python"
        )
