"""What `memrt train` trains: a causal language model or a classifier, and its tokenizer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memrt.cli.model import most_tokens, quiet_hub, tokenizer_from
from memrt.cli.train_config import EMBEDDED, TrainConfig
from memrt.data import byte_level_tokenizer
from memrt.data_files import TextStream, is_stream, require_file
from memrt.data_records import RecordFile, Row
from memrt.embedded import MODEL_NAME, embedded_config
from memrt.model_source import (
    CLASSIFICATION,
    auto_class,
    brings_code,
    class_names,
    resolve_config,
    task_of,
    weight_source,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from memrt.data import DataSettings

__all__ = ["TrainedModel", "tokenizer_for"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

# Enough for the counts of a few ten thousand merges; the trainer holds every distinct word.
_MAX_TOKENIZER_CHARACTERS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """Where a model comes from, before it is loaded."""

    source: Any
    """What `memrt.load` takes."""
    config: Any
    name: str
    has_weights: bool
    task: str = "causal-lm"
    trusted: bool = False
    """Whether Python code that the model brings may run."""

    has_new_head: bool = False
    """Whether a classifier's head is drawn for this run."""

    @classmethod
    def resolve(cls, settings: TrainConfig) -> TrainedModel:
        """From `model.path` or `model.config`; reads no weights."""
        path, inline = settings.values["model.path"], settings.values["model.config"]
        if inline is not None:
            source = _inline_config(inline)
            name = f"{source.model_type} from model.config"
        else:
            source = embedded_config() if path == EMBEDDED else path
            name = MODEL_NAME if path == EMBEDDED else str(path)
        trusted = bool(settings.values["model.trust_remote_code"])
        try:
            with quiet_hub():
                config = resolve_config(source, trust_remote_code=trusted)
        except ValueError as error:
            raise ValueError(f"model.path={_with_our_names(error)}") from error
        task = _task(config, settings.values["model.task"], name)
        has_weights = weight_source(source, config) is not None
        own = set(getattr(config, "architectures", None) or ())
        found = cls(
            source=source,
            config=config,
            name=name,
            has_weights=has_weights,
            task=task,
            trusted=trusted,
            has_new_head=task == CLASSIFICATION
            and not (has_weights and own & class_names(config, task)),
        )
        found._check(settings.data.sequence_length)
        return found

    def _check(self, sequence_length: int) -> None:
        problem = None if self.trusted else brings_code(self.config, self.auto_class)
        if problem is not None:
            raise ValueError(f"model {self.name}: {_with_our_names(problem)}")
        limit = most_tokens(self.config)
        if limit is not None and sequence_length > limit:
            raise ValueError(
                f"data.sequence_length={sequence_length}: the model has positions for {limit} "
                "tokens (max_position_embeddings of its config); lower sequence_length"
            )

    @property
    def auto_class(self) -> Any:
        """The transformers auto class for the task."""
        return auto_class(self.config, self.task)

    def with_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> TrainedModel:
        """With the tokenizer's special tokens, where weights are random and no id means a thing."""
        if self.has_weights:
            return self
        config = copy.deepcopy(self.config)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        return replace(self, source=config, config=config)

    def load(self, settings: TrainConfig) -> tuple[nn.Module, list[str]]:
        """The model on the device where it trains, one tensor at a time; and what to tell of it."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = self.build(settings, self.source, device=settings.arguments.device)
        return model, [str(each.message) for each in told]

    def build(self, settings: TrainConfig, source: Any, *, device: Any = None) -> nn.Module:
        """The model with the strategies' weights, from its source or from its config alone."""
        from memrt.loading import load

        return load(
            source,
            settings.strategies,
            config=self.config,
            dtype=settings.dtype,
            device=device,
            seed=settings.seed,
            task=self.task,
            trust_remote_code=self.trusted,
        )


def _task(config: Any, wanted: str | None, name: str) -> str:
    """`model.task`, or what the config is for."""
    if wanted is not None:
        try:
            auto_class(config, wanted)
        except ValueError as error:
            raise ValueError(f"model.{error}") from error
        return wanted
    found = task_of(config)
    if found not in ("causal-lm", CLASSIFICATION) or not hasattr(config, "vocab_size"):
        raise ValueError(
            f"model {name} is for {found}; `memrt train` trains causal language models and "
            f"classifiers of text (model.task={CLASSIFICATION} puts a new head on it), others go "
            "through memrt.Trainer in Python"
        )
    return found


def _with_our_names(error: object) -> str:
    return str(error).replace("pass trust_remote_code=True", "pass --trust-remote-code")


def _inline_config(fields: dict[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    from memrt.errors import nearest, unknown_name

    values = dict(fields)
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        known = nearest(str(kind), CONFIG_MAPPING)
        raise ValueError(
            f"model.config.model_type={kind!r}: must be a model type of transformers, such as llama"
            f"{known}"
        )
    config_class = CONFIG_MAPPING[kind]
    # a config takes every name, so that a misspelled one would train another model
    known_fields = {*config_class().to_dict(), *config_class.attribute_map}
    for name in values:
        if name not in known_fields:
            raise unknown_name(f"key model.config.{name}: field of {kind}", name, known_fields)
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------- tokenizer


def tokenizer_for(
    settings: TrainConfig, model: TrainedModel, data: DataSettings, *, checkpoint: Path | None
) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer, and how a report names it; a resumed run takes that of its checkpoint."""
    path = settings.values["model.path"]
    named = settings.values["model.tokenizer"] or _own(path)
    if named is not None:
        tokenizer, name = _from_pretrained(named, model.trusted), named
    elif model.has_weights:
        raise ValueError(
            f"{model.name} has weights and no tokenizer; name the one that it was trained with: "
            "model.tokenizer=FOLDER_OR_HUB_ID"
        )
    else:
        name = "byte-level BPE trained on the data"
        if checkpoint is not None and _has_tokenizer(checkpoint):
            tokenizer = _from_pretrained(str(checkpoint), model.trusted)
        else:
            tokenizer = byte_level_tokenizer(_text(data), model.config.vocab_size)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {name} has {len(tokenizer)} tokens and {model.name} a vocabulary of "
            f"{model.config.vocab_size} (vocab_size of its config), so that ids would be out of "
            "range; name the model's own with model.tokenizer, or raise vocab_size"
        )
    return tokenizer, name


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _own(path: str | None) -> str | None:
    """Where the model's own tokenizer is; None where it has none."""
    if path is None or path == EMBEDDED:
        return None
    local = Path(path)
    if not local.exists():
        return path  # a hub id
    folder = local if local.is_dir() else local.parent
    return str(folder) if _has_tokenizer(folder) else None


def _from_pretrained(name: str, trusted: bool) -> Any:
    try:
        return tokenizer_from(name, trusted=trusted)
    except ValueError as error:
        raise ValueError(f"{error}; name one with model.tokenizer=FOLDER_OR_HUB_ID") from error


def _text(data: DataSettings) -> str:
    """The text of the training data, as far as a tokenizer needs it."""
    source: Any
    if data.path is not None:
        require_file(data.path, "data.path")
    if data.path is None or is_stream(data.path, "data.path"):
        source = TextStream(path=data.path)
        source.check()
        pieces: Iterator[str] = source.pieces()
    else:
        source = RecordFile.open(data.path, data)
        pieces = (
            text + "\n"
            for row in source.rows()
            for text in chain.from_iterable(map(_strings, _texts(source, row)))
        )
    found: list[str] = []
    num_characters = 0
    for piece in pieces:
        found.append(piece)
        num_characters += len(piece)
        if num_characters > _MAX_TOKENIZER_CHARACTERS:
            break
    return "".join(found)


def _texts(source: RecordFile, row: Row) -> tuple[Any, ...]:
    return row.values[:-1] if source.kind == "classification" else row.values


def _strings(value: Any) -> list[str]:
    """A column's text, or that of all messages."""
    return [value] if isinstance(value, str) else [message["content"] for message in value]
