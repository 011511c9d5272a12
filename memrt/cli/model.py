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

__all__ = ["Model", "most_tokens", "quiet_hub", "tokenizer_from"]

_CLASSIFIERS = ("sequence-classification", "token-classification", "image-classification")

# Positions of these begin behind the padding's id.
_COUNT_FROM_PADDING = ("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl")

_NO_TOKENIZER = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError)
"""What transformers raises for files that are not there, cut, or hold something else."""


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


def tokenizer_from(name: str, *, trusted: bool) -> Any:
    """The tokenizer of a folder or hub id; `ValueError` where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        with quiet_hub():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
    except Exception as error:
        # the tokenizers package raises no narrower class for a file that it cannot parse
        if type(error) is not Exception and not isinstance(error, _NO_TOKENIZER):
            raise
        text = " ".join(str(error).split())[:300]
        if not isinstance(error, OSError | ValueError | ImportError):
            text = f"a file of it is damaged, or of another version: {text}"
        raise ValueError(f"no tokenizer could be loaded from {name!r} ({text})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model that a command was given."""

    source: Any
    """What `memrt.load` takes: a path, a hub id, or the embedded config."""
    config: Any
    name: str
    has_weights: bool
    dtype: torch.dtype
    task: str = "causal-lm"
    trusted: bool = False
    """Whether Python code that the model brings may run."""

    has_new_head: bool = False
    """Whether a classifier's head is drawn, for the weights are of a model without it."""

    @classmethod
    def resolve(cls, arguments: argparse.Namespace, progress: Progress) -> Model:
        """From `--model`, `--task`, `--labels` and `--dtype`."""
        from memrt.embedded import MODEL_NAME, embedded_config
        from memrt.model_source import CLASSIFICATION, class_names, for_task, weight_source

        source = embedded_config() if arguments.model is None else arguments.model
        name = MODEL_NAME if arguments.model is None else str(arguments.model)
        if arguments.model is not None and not Path(name).exists():
            progress.say(f"{name} is no local path: asking the Hugging Face Hub")
        trusted = arguments.trust_remote_code
        config = _config(source, trusted)
        task = _task(config, arguments.task, name, trusted)
        limit = most_tokens(config)
        if limit is not None and arguments.sequence_length > limit:
            raise ValueError(
                f"--seq {arguments.sequence_length}: {name} has positions for {limit} tokens "
                "(config.max_position_embeddings); lower --seq"
            )
        has_weights = weight_source(source, config) is not None
        own = set(getattr(config, "architectures", None) or ())
        has_head = has_weights and bool(own & class_names(config, task))
        config = for_task(config, task)
        _set_labels(config, getattr(arguments, "labels", None), task, name, fixed=has_head)
        return cls(
            source=source,
            config=config,
            name=name,
            has_weights=has_weights,
            dtype=_dtype(arguments.dtype, config, name),
            task=task,
            trusted=trusted,
            has_new_head=task == CLASSIFICATION and not has_head,
        )

    def load(self, strategies: Sequence[Strategy], device: torch.device) -> nn.Module:
        """The model with its weights, random ones where the source has none."""
        from memrt.loading import load

        return load(
            self.source,
            strategies,
            config=self.config,
            dtype=self.dtype,
            device=device,
            task=self.task,
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


def most_tokens(config: Any) -> int | None:
    """The tokens that a model has positions for; None where it does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    if config.model_type in _COUNT_FROM_PADDING:
        limit -= int(config.pad_token_id or 0) + 1
    return limit


def _task(config: Any, wanted: str | None, name: str, trusted: bool) -> str:
    from memrt.model_source import auto_class, brings_code, task_of

    try:
        task = task_of(config, wanted)
    except ValueError as error:
        raise ValueError(str(error).replace("task=", "--task ", 1)) from error
    problem = None if trusted else brings_code(config, auto_class(config, task))
    if problem is not None:
        raise ValueError(f"{name}: {_as_flag(problem)}")
    return task


def _set_labels(config: Any, labels: int | None, task: str, name: str, *, fixed: bool) -> None:
    """`--labels`: the classes of a head that is not trained yet."""
    if labels is None:
        return
    if task not in _CLASSIFIERS:
        raise ValueError(
            f"--labels {labels}: {name} is for {task}; add --task sequence-classification, or "
            "leave --labels out"
        )
    if fixed and labels != config.num_labels:
        raise ValueError(
            f"--labels {labels}: the head of {name} has {config.num_labels} classes; leave it out"
        )
    config.num_labels = labels
