"""From flags to what is trained: the model's config, its tokenizer, and the batches in order.

Batches of data that is not packed are padded to its longest example, so that every batch has the
one shape that memory is planned for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from memrt.data import PreparedData
    from memrt.measure import Workload
    from memrt.runner import Batch
    from memrt.strategy import Strategy
    from memrt.structure import RunSettings

__all__ = ["Batches", "Model", "batches_for", "device_for", "settings_for", "workload_for"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_LANGUAGE_MODELS = ("causal-lm", "masked-lm", "seq2seq-lm")
_MAX_EVALUATION_BATCHES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model that a command was given."""

    source: Any
    """What `memrt.load` takes: a path, a hub id, or the embedded config."""
    config: Any
    name: str
    has_weights: bool
    dtype: torch.dtype

    @classmethod
    def resolve(cls, arguments: argparse.Namespace) -> Model:
        """From `--model` and `--dtype`; refuses what is no language model."""
        from memrt.embedded import MODEL_NAME, embedded_config
        from memrt.model_source import resolve_config, weight_source

        source = embedded_config() if arguments.model is None else arguments.model
        name = MODEL_NAME if arguments.model is None else str(arguments.model)
        config = resolve_config(source)
        _require_language_model(config, name)
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
            dtype=getattr(torch, arguments.dtype),
        )

    def load(self, strategies: Sequence[Strategy]) -> nn.Module:
        """The model with its weights, random ones where the source has none."""
        from memrt.loading import load

        return load(self.source, strategies, dtype=self.dtype)

    def load_fake(self) -> nn.Module:
        """Its shapes alone; inside `memrt.profiling.fake.fake_tensors()`."""
        from memrt.loading import load

        return load(self.config, [], dtype=self.dtype)


def _require_language_model(config: Any, name: str) -> None:
    from memrt.model_source import TASKS, auto_class

    task = {auto: task for task, auto in TASKS.items()}[auto_class(config).__name__]
    if task not in _LANGUAGE_MODELS or not hasattr(config, "vocab_size"):
        raise ValueError(
            f"{name} is for {task}; the command line trains language models on text, others go "
            "through memrt.plan and memrt.prepare in Python"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Micro-batches of every optimizer step, held-out batches, and where they come from."""

    windows: list[list[Batch]]
    evaluation: list[Batch]
    description: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, tokens) of every batch."""
        batch, tokens = self.windows[0][0]["input_ids"].shape
        return int(batch), int(tokens)


def device_for(text: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {text}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {text}: torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    return device


def settings_for(arguments: argparse.Namespace) -> RunSettings:
    """The optimizer's settings of a real run."""
    from memrt.structure import RunSettings

    return RunSettings(
        learning_rate=arguments.learning_rate,
        max_grad_norm=arguments.max_grad_norm,
        accumulation_steps=arguments.accumulation_steps,
        seed=arguments.seed,
    )


def batches_for(
    arguments: argparse.Namespace,
    model: Model,
    *,
    num_steps: int,
    evaluation_fraction: float = 0.0,
) -> Batches:
    """Read, tokenise and batch the data; the same flags give the same batches."""
    from memrt.data import DataSettings, load_examples

    tokenizer, tokenizer_name = _tokenizer(arguments, model)
    settings = DataSettings(
        path=arguments.data,
        sequence_length=arguments.sequence_length,
        truncation=arguments.truncation,
        text_column=arguments.text_column,
        prompt_column=arguments.prompt_column,
        completion_column=arguments.completion_column,
        messages_column=arguments.messages_column,
        evaluation_fraction=evaluation_fraction,
        seed=arguments.seed,
    )
    data = load_examples(settings, tokenizer)
    windows, evaluation = _arrange(arguments, data, tokenizer, num_steps)
    return Batches(
        windows=windows,
        evaluation=evaluation,
        description={
            "data": data.summary.train.source,
            "tokenizer": tokenizer_name,
            "num_training_examples": len(data.train),
            "num_evaluation_batches": len(evaluation),
        },
    )


def _arrange(
    arguments: argparse.Namespace, data: PreparedData, tokenizer: Any, num_steps: int
) -> tuple[list[list[Batch]], list[Batch]]:
    from memrt.data import Collator

    size = arguments.batch_size
    if len(data.train) < size:
        raise ValueError(
            f"--batch {size}: the data has {len(data.train)} examples of --seq "
            f"{arguments.sequence_length} to train on; lower --batch or --seq, or give more data"
        )
    longest = max(
        Collator.for_tokenizer(tokenizer).batch_shape(part, batch_size=size)[1]
        for part in (data.train, data.evaluation)
        if part is not None
    )
    collator = Collator.for_tokenizer(tokenizer, length=longest)
    order = _order(len(data.train), num_steps * arguments.accumulation_steps * size, arguments.seed)
    batches = [
        collator([data.train[index] for index in order[start : start + size]])
        for start in range(0, len(order), size)
    ]
    steps = arguments.accumulation_steps
    windows: list[list[Batch]] = [
        list(batches[start : start + steps]) for start in range(0, len(batches), steps)
    ]
    held_out = data.evaluation
    evaluation: list[Batch] = []
    if held_out is not None:
        last = min(len(held_out), size * _MAX_EVALUATION_BATCHES)
        for start in range(0, last, size):
            chosen = range(start, min(start + size, last))
            evaluation.append(collator([held_out[index] for index in chosen]))
    return windows, evaluation


def _order(num_examples: int, wanted: int, seed: int) -> list[int]:
    """Shuffled epochs, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(num_examples, generator=generator).tolist()
    return order[:wanted]


def _tokenizer(arguments: argparse.Namespace, model: Model) -> tuple[Any, str]:
    """The tokenizer and how it is named in reports."""
    named = arguments.tokenizer or _own_tokenizer(arguments.model)
    if named is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(named)
    elif model.has_weights:
        raise ValueError(
            f"{model.name} has weights and no tokenizer; name the one it was trained with: "
            "--tokenizer DIR_OR_HUB_ID"
        )
    else:
        from memrt.embedded import VOCABULARY, embedded_tokenizer

        tokenizer = embedded_tokenizer(min(VOCABULARY, model.config.vocab_size))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, {model.name} has a vocabulary of "
            f"{model.config.vocab_size}; name the model's own with --tokenizer"
        )
    return tokenizer, named or "byte-level BPE of the embedded text"


def _own_tokenizer(model: str | None) -> str | None:
    """Where the model's own tokenizer is; None where it has none."""
    if model is None:
        return None
    path = Path(model)
    if not path.exists():
        return model  # a hub id
    folder = path if path.is_dir() else path.parent
    found = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return str(folder) if found else None


def workload_for(
    arguments: argparse.Namespace, model: Model, *, evaluation_fraction: float = 0.0
) -> Workload:
    """Everything that a measured run needs, on the device where it runs."""
    from memrt.measure import Workload

    device = device_for(arguments.device)
    batches = batches_for(
        arguments, model, num_steps=arguments.steps, evaluation_fraction=evaluation_fraction
    )
    batch_size, sequence_length = batches.shape

    def there(batch: Batch) -> Batch:
        return {name: tensor.to(device) for name, tensor in batch.items()}

    return Workload(
        build=model.load,
        windows=[[there(batch) for batch in window] for window in batches.windows],
        evaluation=[there(batch) for batch in batches.evaluation],
        settings=settings_for(arguments),
        device=device,
        description={
            "model": model.name,
            "weights": "loaded" if model.has_weights else "random",
            **batches.description,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "accumulation_steps": arguments.accumulation_steps,
            "steps": arguments.steps,
            "dtype": arguments.dtype,
            "optimizer": "AdamW",
            "learning_rate": arguments.learning_rate,
            "max_grad_norm": arguments.max_grad_norm,
            "seed": arguments.seed,
        },
    )
