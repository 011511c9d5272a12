"""The settings of `memrt train`: their names, types and defaults, read from the classes they fill.

    output, seed, dtype, strategies, memory_budget     the run
    model.*                             what is trained
    data.*                              the fields of memrt.data.DataSettings
    training.*                          the fields of memrt.TrainingArguments

A name is checked against this list and a value against its type before anything is read.
"""

from __future__ import annotations

import typing
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

from memrt.arguments import TrainingArguments
from memrt.cli.train_types import in_words
from memrt.data import DataSettings
from memrt.data_files import SOURCES
from memrt.spellings import is_spelling

__all__ = ["ALIASES", "SECTIONS", "Key", "find_key", "keys", "unknown_key"]

SECTIONS = ("model", "data", "training")

ALIASES = {
    "seq": "data.sequence_length",
    "batch": "training.per_device_train_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "accumulation": "training.gradient_accumulation_steps",
    "lr": "training.learning_rate",
    "steps": "training.max_steps",
    "epochs": "training.num_train_epochs",
    "model": "model.path",
    "data": "data.path",
}
"""Short names on the command line; those that the other commands have, and `--epochs`."""

_DEFAULTS = {
    "training.memory_report": True,
    "training.logging_steps": 10,
    "training.logging_first_step": True,
    "training.include_num_input_tokens_seen": "non_padding",
}
"""Where `memrt train` differs from transformers."""

_ONE_PROCESS = "`memrt train` is one process; for several use memrt.Trainer in a script of your own"
_NO_EFFECT = "it has no effect here; leave it out"
_ELSEWHERE = {
    "output_dir": "set output",
    "strategies": "set strategies, beside training",
    "memory_budget": "set memory_budget, beside training",
    "seed": "set seed, beside training",
    "resume_from_checkpoint": "pass --resume or --resume FOLDER",
    "hub_token": "log in with `hf auth login`; settings are written into the output folder",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _NO_EFFECT),
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "include_for_metrics",
            "batch_eval_metrics",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
        ),
        "evaluation here is the loss, and the accuracy of a classifier; leave it out",
    ),
    **dict.fromkeys(
        (
            "average_tokens_across_devices",
            "ddp_backend",
            "ddp_broadcast_buffers",
            "ddp_bucket_cap_mb",
            "ddp_find_unused_parameters",
            "ddp_static_graph",
            "ddp_timeout",
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "local_rank",
            "log_level_replica",
            "log_on_each_node",
            "parallelism_config",
            "save_on_each_node",
        ),
        _ONE_PROCESS,
    ),
}
"""Fields of TrainingArguments that are not settings of a run here, and what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One setting."""

    name: str
    hint: Any
    default: Any
    help: str

    @property
    def expected(self) -> str:
        """The type in words."""
        return in_words(self.hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelSettings:
    """The fields of section `model`, with their help."""

    path: str | None = field(
        default=None,
        metadata={
            "help": "A folder, a config.json (random weights), a hub id, or embedded (a Llama of "
            "8.9 M parameters)."
        },
    )
    config: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Instead of path: model_type and fields of its transformers config, for "
            "random weights."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "A folder or hub id. Default: the model's own; for random weights without "
            "one, a byte-level BPE trained on the data."
        },
    )
    task: Literal["causal-lm", "sequence-classification"] | None = field(
        default=None,
        metadata={
            "help": "Default: what the config names. sequence-classification puts a new head on a "
            "model without one; the data then has a text and a label."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the Python code that a model brings with it; read it first."},
    )


_RUN = (
    Key(name="output", hint=str, default="memrt-run", help="Folder of the run."),
    Key(
        name="seed", hint=int, default=42, help="Of weights, data order, dropout and held-out part."
    ),
    Key(
        name="dtype",
        hint=Literal["float32", "bfloat16"],
        default="float32",
        help="Of the weights; training.bf16 is mixed precision over float32 weights.",
    ),
    Key(
        name="strategies",
        hint=list[str | dict[str, Any]],
        default=[],
        help="Memory strategies: name, name(option=value), or in YAML {name: {option: value}}.",
    ),
    Key(
        name="memory_budget",
        hint=str | None,
        default=None,
        help="Card or size, such as 24GiB: add the strategies that change training least and fit.",
    ),
)

_DATA_HELP = {
    "path": f"{SOURCES.capitalize()}, owner/name:split (default: train), or embedded (text that "
    "comes with Python).",
    "sequence_length": "Tokens of the longest example; of every one where packed.",
    "packing": "true, false, or auto: pack text, not prompts with completions and not chats.",
    "truncation": "For examples that are longer: error, cut or drop. Default: error.",
    "text_column": "Column that is the text.",
    "prompt_column": "Column that is the prompt; it is given and not trained on.",
    "completion_column": "Column that is the completion.",
    "messages_column": "Column with chat messages; the assistant's are trained on.",
    "label_column": "Column that is the label, a name or a whole number, for a classifier.",
    "text_pair_column": "Column that is a second text, for a classifier of pairs.",
    "columns": "Names of all columns of a .csv or .tsv that has no header line.",
    "quoting": "Whether quotes enclose cells: true, false, or auto (in a .csv, not in a .tsv).",
    "configuration": "Of a dataset of the Hub that has several.",
    "separator": "Between prompt and completion.",
    "evaluation_path": "What to evaluate on: a file, or a dataset of the Hub (owner/name:split).",
    "evaluation_fraction": "Part of the data that is held out to evaluate on.",
    "seed": "Of the held-out part. Default: seed.",
}


@cache
def keys() -> dict[str, Key]:
    """Every setting by its full name, in the order of the help."""
    found = list(_RUN)
    for section, cls in (
        ("model", _ModelSettings),
        ("data", DataSettings),
        ("training", TrainingArguments),
    ):
        hints = typing.get_type_hints(cls)
        for each in fields(cls):
            name = f"{section}.{each.name}"
            if section == "training" and each.name in _ELSEWHERE:
                continue
            factory = each.default_factory
            default = each.default if factory is MISSING else factory()
            text = _DATA_HELP[each.name] if section == "data" else each.metadata.get("help", "")
            found.append(
                Key(
                    name=name,
                    hint=hints[each.name] if name != "data.seed" else int | None,
                    default=_DEFAULTS.get(name, None if name == "data.seed" else default),
                    help=text,
                )
            )
    return {key.name: key for key in found}


# ---------------------------------------------------------------- names


def find_key(word: str) -> str:
    """The full name behind what was typed: full, short, or the last part where only one has it."""
    name = word.replace("-", "_")
    if name in keys() or _inside_mapping(name) or is_spelling(name.rpartition(".")[2]):
        return name
    if name in ALIASES:
        return ALIASES[name]
    found = [full for full in keys() if full.rpartition(".")[2] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{word!r} is in more than one section: name {' or '.join(found)}")
    raise unknown_key(name)


def _inside_mapping(name: str) -> bool:
    """Whether it names an entry of a setting that is a mapping, as model.config.hidden_size."""
    parts = name.split(".")
    parents = (".".join(parts[:end]) for end in range(2, len(parts)))
    return any(parent in keys() and "a mapping" in keys()[parent].expected for parent in parents)


def unknown_key(name: str) -> ValueError:
    """The error for a name that is no setting."""
    section, _, last = name.rpartition(".")
    if section in ("", "training") and last in _ELSEWHERE:
        return ValueError(f"training.{last}: {_ELSEWHERE[last]}")
    candidates = {full.rpartition(".")[2]: full for full in reversed(list(keys()))}
    candidates |= {full: full for full in keys()}
    if not section:
        candidates |= {each: each for each in SECTIONS} | ALIASES
    close = get_close_matches(name, candidates, n=1, cutoff=0.6)
    close = close or get_close_matches(last, candidates, n=1, cutoff=0.6)
    meant = candidates[close[0]] if close else None
    if section and ALIASES.get(last, "").startswith(f"{section}."):
        meant = ALIASES[last]  # training.lr: a short name is whole by itself
    hint = "" if meant is None else f"; did you mean {meant!r}?"
    return ValueError(f"unknown key {name!r}{hint or '; `memrt train --help` lists the keys'}")
