"""Sequence classification on the command line: labels, the config of the head, and accuracy."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from memrt.data import Labels, read_label_names
from memrt.model_source import CLASSIFICATION, class_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memrt.cli.model import Model
    from memrt.cli.train_config import TrainConfig
    from memrt.cli.train_model import TrainedModel
    from memrt.data import Collator, DataSettings, PreparedData

__all__ = [
    "LABEL_COLUMN",
    "classifier_of",
    "data_for",
    "frozen_head",
    "metrics_for",
    "require_metric",
    "without_unused_types",
]

_AnyModel = TypeVar("_AnyModel", "Model", "TrainedModel")

LABEL_COLUMN = "label"
"""Of a classifier's data, unless another is named."""


def data_for(settings: TrainConfig, task: str) -> DataSettings:
    """The data's settings for a task: a classifier's labels are in column `label` by default."""
    given = settings.data
    if task != CLASSIFICATION:
        if given.label_column is not None:
            raise ValueError(
                f"data.label_column={given.label_column!r}: labels are for classifiers, and this "
                f"model is for {task}; set model.task={CLASSIFICATION}, or leave it out"
            )
        return given
    return settings.data_with(label_column=given.label_column or LABEL_COLUMN)


def classifier_of(
    model: _AnyModel, data: DataSettings, tokenizer: PreTrainedTokenizerBase, collator: Collator
) -> tuple[_AnyModel, Labels]:
    """The model with the classes of the data in its config, and padding that its head knows."""
    found = read_label_names(data)
    labels = Labels(found)
    if not model.has_new_head:
        labels = Labels.of_head(_head_names(model), found, path=data.path)
    config = copy.deepcopy(model.config)
    config.architectures = [min(class_names(config, CLASSIFICATION))]
    config.id2label = dict(enumerate(labels.names))
    config.label2id = {name: index for index, name in enumerate(labels.names)}
    config.problem_type = "single_label_classification"
    # decoders take the last token that is none of padding
    for each in (config, config.get_text_config()):
        each.pad_token_id = collator.pad_token_id
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    source = model.source if model.has_weights else config
    return replace(model, config=config, source=source), labels


def _head_names(model: Model | TrainedModel) -> list[str]:
    config = model.config
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        kind = config.problem_type or "regression"
        raise ValueError(
            f"model {model.name} is a classifier for {kind}, with {config.num_labels} outputs; "
            "the command line trains those with one label of several, others go through "
            "memrt.Trainer in Python"
        )
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def without_unused_types(data: PreparedData, config: Any) -> PreparedData:
    """Without `token_type_ids` where the model has no use for them."""
    import transformers

    kind = getattr(transformers, config.architectures[0], None)
    names = data.train.column_names
    if kind is None or "token_type_ids" not in names:
        return data
    if "token_type_ids" in inspect.signature(kind.forward).parameters:
        return data
    held_out = data.evaluation
    return replace(
        data,
        train=data.train.remove_columns("token_type_ids"),
        evaluation=held_out and held_out.remove_columns("token_type_ids"),
    )


def metrics_for(task: str) -> dict[str, Any]:
    """What the Trainer is given for its evaluation; logits are never kept."""
    if task != CLASSIFICATION:
        return {}
    return {"compute_metrics": _accuracy, "preprocess_logits_for_metrics": _predicted}


def require_metric(arguments: Any, task: str) -> None:
    """Refuse to look for the best checkpoint by what no evaluation here tells."""
    name = arguments.metric_for_best_model
    known = ("loss", "accuracy") if task == CLASSIFICATION else ("loss",)
    if name is not None and name.removeprefix("eval_") not in known:
        raise ValueError(
            f"training.metric_for_best_model={name!r}: evaluation here is {' and '.join(known)}; "
            "name one of these, or leave it out"
        )


def _predicted(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    scores = logits[0] if isinstance(logits, tuple) else logits  # [batch, classes]
    predicted: torch.Tensor = scores.argmax(dim=-1)
    return predicted


def _accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions == found.label_ids).mean())}


def frozen_head(model: Any) -> list[str]:
    """The parameters of a head of which no strategy trains any."""
    prefix = f"{model.base_model_prefix}."
    head = [(name, p) for name, p in model.named_parameters() if not name.startswith(prefix)]
    trains = any(parameter.requires_grad for _, parameter in head)
    return [] if trains else [name for name, _ in head]
