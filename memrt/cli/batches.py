"""The batches of a run, in order, from `--data` and its flags.

Batches of data that is not packed are padded to its longest example, so that every batch has the
one shape that memory is planned for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import argparse

    from memrt.cli.model import Model
    from memrt.cli.progress import Progress
    from memrt.data import DataSettings, PreparedData
    from memrt.runner import Batch

__all__ = ["Batches", "batches_for", "require_data"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_READABLE = ("causal-lm", "masked-lm", "seq2seq-lm", "sequence-classification")
_MAX_EVALUATION_BATCHES = 2
_FLAGS = {
    "evaluation_path": "--evaluation-data",
    "evaluation_fraction": "--evaluation-fraction",
    "sequence_length": "--seq",
    "truncation": "--truncation",
    "text_column": "--text-column",
    "prompt_column": "--prompt-column",
    "completion_column": "--completion-column",
    "messages_column": "--messages-column",
    "label_column": "--label-column",
    "text_pair_column": "--text-pair-column",
    "columns": "--columns",
    "configuration": "--configuration",
    "path": "--data",
}
"""Names in `memrt.data.DataSettings` and the flags that set them."""


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


def require_data(arguments: argparse.Namespace) -> None:
    """Refuse files that are not there, before a model is asked for."""
    from memrt.data_files import is_stream, require_file

    for flag, name in (("data", "path"), ("evaluation_data", "evaluation_path")):
        path = getattr(arguments, flag, None)
        if path is None:
            continue
        try:
            is_stream(path, name)  # refuses what no file of data is called
            require_file(path, name)
        except ValueError as error:
            raise ValueError(_as_flags(str(error))) from None


def batches_for(
    arguments: argparse.Namespace, model: Model, progress: Progress, *, num_steps: int
) -> tuple[Model, Batches]:
    """Read, tokenise and batch the data; the same flags give the same batches.

    Also returns the model: a classifier has the classes of the data in its config.
    """
    _refuse_unreadable(arguments, model)
    progress.say(f"reading {arguments.data or 'the text that comes with Python'}")
    tokenizer, tokenizer_name = _tokenizer(arguments, model)
    try:
        model, data = _examples(_data_settings(arguments, model), model, tokenizer)
    except ValueError as error:
        raise ValueError(_as_flags(str(error))) from error
    windows, evaluation = _arrange(arguments, data, tokenizer, num_steps)
    classes = {} if data.label_names is None else {"label_names": list(data.label_names)}
    batches = Batches(
        windows=windows,
        evaluation=evaluation,
        description={
            "data": data.summary.train.source,
            "tokenizer": tokenizer_name,
            "num_training_examples": len(data.train),
            "num_evaluation_batches": len(evaluation),
            "task": model.task,
            **classes,
        },
    )
    return model, batches


def _examples(settings: DataSettings, model: Model, tokenizer: Any) -> tuple[Model, PreparedData]:
    from memrt.cli.train_classes import classifier_of, without_unused_types
    from memrt.data import Collator, load_examples

    if settings.label_column is None:
        return model, load_examples(settings, tokenizer)
    collator = Collator.for_tokenizer(tokenizer)
    model, labels = classifier_of(model, settings, tokenizer, collator)
    data = load_examples(settings, tokenizer, labels=labels)
    return model, without_unused_types(data, model.config)


def _refuse_unreadable(arguments: argparse.Namespace, model: Model) -> None:
    """Data is texts, or texts with labels; nothing makes up labels where there is none."""
    from memrt.model_source import CLASSIFICATION

    if model.task not in _READABLE or not hasattr(model.config, "vocab_size"):
        raise ValueError(
            f"{model.name} is for {model.task}; the command line reads data for language models "
            "and classifiers of texts. `memrt plan` without --data plans it, memrt.prepare in "
            "Python trains it"
        )
    if model.task == CLASSIFICATION and arguments.data is None:
        raise ValueError(
            f"{model.name} is a classifier, which trains on texts with labels: name them with "
            "--data (and --label-column, unless the column is 'label')"
        )
    if model.task != CLASSIFICATION and arguments.label_column is not None:
        raise ValueError(
            f"--label-column {arguments.label_column}: {model.name} is for {model.task}; add "
            f"--task {CLASSIFICATION}, or leave --label-column out"
        )


def _data_settings(arguments: argparse.Namespace, model: Model) -> DataSettings:
    from memrt.cli.train_classes import LABEL_COLUMN
    from memrt.data import DataSettings
    from memrt.model_source import CLASSIFICATION

    default = LABEL_COLUMN if model.task == CLASSIFICATION else None
    return DataSettings(
        path=arguments.data,
        sequence_length=arguments.sequence_length,
        truncation=arguments.truncation,
        text_column=arguments.text_column,
        prompt_column=arguments.prompt_column,
        completion_column=arguments.completion_column,
        messages_column=arguments.messages_column,
        label_column=arguments.label_column or default,
        text_pair_column=arguments.text_pair_column,
        columns=arguments.columns,
        configuration=arguments.configuration,
        # compare's own
        evaluation_path=getattr(arguments, "evaluation_data", None),
        evaluation_fraction=getattr(arguments, "evaluation_fraction", 0.0),
        seed=arguments.seed,
    )


def _as_flags(text: str) -> str:
    """An error of `memrt.data` with the command line's names for its arguments."""
    for name, flag in _FLAGS.items():
        text = re.sub(rf"(?<![\w/.-]){name}=", f"{flag} ", text)
        if "_" in name:  # path, columns and truncation are ordinary words too
            text = re.sub(rf"(?<![\w/.-]){name}\b(?![/.])", flag, text)
    return text


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
        from memrt.cli.model import tokenizer_from

        try:
            tokenizer = tokenizer_from(named, trusted=model.trusted)
        except ValueError as error:
            raise ValueError(f"{error}; name one with --tokenizer DIR_OR_HUB_ID") from error
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
