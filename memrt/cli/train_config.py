"""From a YAML file and `key=value` words to the settings of a run: one tree, checked and complete.

Later words win over earlier ones, words over the file, and both over defaults. OmegaConf resolves
`${...}` in the file (`${oc.env:HOME}/data.jsonl`, `${seed}`) after the words are in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memrt import registry
from memrt.arguments import TrainingArguments
from memrt.cli.stacks import parse_stack
from memrt.cli.train_keys import SECTIONS, Key, find_key, keys, unknown_key
from memrt.cli.train_ranges import require_ranges
from memrt.cli.train_types import require_type
from memrt.data import DataSettings
from memrt.data_files import SOURCES
from memrt.translation import translated

if TYPE_CHECKING:
    from memrt.strategy import Strategy

__all__ = ["EMBEDDED", "TrainConfig", "folder_of", "resolve"]

EMBEDDED = "embedded"
"""The model and the text that come with Python and memrt."""

_ALWAYS = ("output", "seed", "dtype", "strategies", "model.path", "data.path")
"""What every run that was written has, in each version."""

EXAMPLE = {
    "model.path": EMBEDDED,
    "data.path": EMBEDDED,
    "data.evaluation_fraction": 0.05,
    "training.per_device_train_batch_size": 4,
    "training.learning_rate": 1e-3,
    "training.max_steps": 50,
    "training.eval_strategy": "steps",
    "training.eval_steps": 25,
    "training.save_steps": 25,
}
"""What is trained when neither a model nor data is named; it gives way to what was typed."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings by full name: all of run, model and data; of training, those that were given."""

    values: Mapping[str, Any]

    @property
    def output(self) -> Path:
        return folder_of(self.values["output"])

    @property
    def seed(self) -> int:
        return int(self.values["seed"])

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.values["dtype"])
        return found

    @cached_property
    def strategies(self) -> list[Strategy]:
        return registry.parse_all(self.values["strategies"])

    @cached_property
    def data(self) -> DataSettings:
        """Checked as `DataSettings` checks itself; its seed is the run's unless it has one."""
        return self.data_with()

    def data_with(self, **changed: Any) -> DataSettings:
        """The data's settings, some of them changed."""
        named = {field.name: self.values[f"data.{field.name}"] for field in fields_of(DataSettings)}
        if named["path"] == EMBEDDED:
            named["path"] = None
        if named["seed"] is None:
            named["seed"] = self.seed
        try:
            return DataSettings(**{**named, **changed})
        except ValueError as error:
            names_a_field = str(error).partition("=")[0] in named
            raise ValueError(f"data{'.' if names_a_field else ': '}{error}") from error

    @cached_property
    def arguments(self) -> Any:
        """`memrt.TrainingArguments` of the run."""
        given = self.section("training")
        if "dataloader_pin_memory" not in given:
            given["dataloader_pin_memory"] = torch.cuda.is_available()  # warns on a CPU
        try:
            return TrainingArguments(
                output_dir=str(self.output),
                seed=self.seed,
                strategies=[str(strategy) for strategy in self.strategies],
                **given,
            )
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"training: {' '.join(str(error).split())}") from error

    def section(self, name: str) -> dict[str, Any]:
        """The settings of one section by their last name."""
        prefix = f"{name}."
        found = self.values.items()
        return {full.removeprefix(prefix): v for full, v in found if full.startswith(prefix)}

    def to_yaml(self) -> str:
        """A config file that gives these settings."""
        tree: dict[str, Any] = {n: v for n, v in self.values.items() if "." not in n}
        tree |= {section: self.section(section) for section in SECTIONS}
        text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
        return text

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """What `to_yaml` wrote."""
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            values = dict(_flat(tree))
        except (yaml.YAMLError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({_one_line(error)})") from error
        lacking = [name for name in _ALWAYS if name not in values]
        if lacking:
            raise ValueError(f"{path} is damaged (it lacks {', '.join(lacking)})")
        return cls(values)


def folder_of(named: str) -> Path:
    """A run's folder as transformers reads its name, which may begin with `~`."""
    return Path(os.path.expanduser(named))


def resolve(
    file: str | None, words: Sequence[tuple[str, list[str]]], *, base: TrainConfig | None = None
) -> TrainConfig:
    """The settings of `file` and `words`, over those of `base`."""
    tree = OmegaConf.create({}) if file is None else _read(file)
    for name in ("output", "seed", "dtype"):  # interpolations may name them
        if name not in tree:
            tree[name] = keys()[name].default if base is None else base.values[name]
    for word, texts in words:
        name = find_key(word)
        try:
            OmegaConf.update(tree, name, _parsed(name, texts), force_add=True)
        except OmegaConfBaseException as error:  # "${" that nothing closes
            reason = str(error.msg or error).partition("\n")[0]
            raise ValueError(f"{word}={' '.join(texts)!r}: {reason}") from error
    try:
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{file}: " if file else ""
        first_line = str(error.msg or error).partition("\n")[0]
        reason = first_line.rpartition("resolving interpolation: ")[2]
        raise ValueError(f"{where}{error.full_key}: {reason}") from error
    assert isinstance(plain, dict)
    given = {} if base is None else dict(base.values)
    given |= dict(_flat(translated(plain, base=given)))
    values = _complete(given)
    require_ranges(values, typed={find_key(word): word for word, _ in words})
    config = TrainConfig(values)
    _ = config.data  # checks itself
    return config


# ---------------------------------------------------------------- the file


def _read(file: str) -> DictConfig:
    if not Path(file).is_file():
        problem = "is a folder" if Path(file).is_dir() else "does not exist"
        raise ValueError(
            f"the config file {file!r} {problem} (relative paths start at {Path.cwd()})"
        )
    try:
        tree = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{file}: must hold keys with values; `memrt train --help` lists them")
    raw = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(raw, dict)
    for section in SECTIONS:
        value = raw.get(section)
        if isinstance(value, str) and section != "training":
            tree[section] = {"path": value}  # `model: name` is short for `model: {path: name}`
        elif value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{section}={value!r}: must be a section with keys")  # words add to it
    return tree


def _flat(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Full names with values; a name that is no setting is refused."""
    for name, value in tree.items():
        if name not in SECTIONS:
            if isinstance(value, Mapping) and name not in keys():
                raise _unknown_section(str(name))
            yield _known(str(name)), value
        elif isinstance(value, Mapping):
            for inner, each in value.items():
                yield _known(f"{name}.{inner}"), each
        elif value is not None:
            raise ValueError(f"{name}={value!r}: must be a section with keys")


def _unknown_section(name: str) -> ValueError:
    close = get_close_matches(name, SECTIONS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the sections are {', '.join(SECTIONS)}"
    return ValueError(f"unknown key {name!r}, which holds keys; {hint}")


def _known(name: str) -> str:
    if name not in keys():
        raise unknown_key(name)
    return name


# ---------------------------------------------------------------- words


def _parsed(name: str, texts: Sequence[str]) -> Any:
    """The value of a setting from what was typed."""
    key = keys().get(name)
    if name == "strategies" and not texts[0].lstrip().startswith("["):
        return [str(strategy) for strategy in parse_stack(texts).strategies]
    if len(texts) > 1:
        return list(texts)
    text = texts[0]
    if key is not None and _is_text(key) and text[:1] not in ("'", '"'):
        return None if text == "null" and "null" in key.expected else text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{name}={text!r}: {_one_line(error)}") from error


def _is_text(key: Key) -> bool:
    """Whether a value is text whatever it looks like: `prompt_column=2` is a column named 2."""
    others = ("number", "true", "list", "mapping")
    return not any(word in key.expected for word in others)


# ---------------------------------------------------------------- defaults


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    model, data = (given.get(name) for name in ("model.path", "data.path"))
    if model is None and given.get("model.config") is None:
        if data is not None:
            raise ValueError(
                "model.path: name a folder, a config.json or a hub id, or embedded for the small "
                "Llama of memrt"
            )
        given = {**_example_beside(given), **given}
    elif model is not None and given.get("model.config") is not None:
        raise ValueError(
            f"model.path={model!r} and model.config both say what is trained; give one"
        )
    elif data is None:
        raise ValueError(f"data.path: name {SOURCES}, or embedded for text that comes with Python")
    values: dict[str, Any] = {}
    for name, key in keys().items():
        if name in given:
            values[name] = _checked(key, given[name])
        elif not (name.startswith("training.") and key.default == _transformers_default(name)):
            values[name] = key.default
    _refuse_two_lengths(values)
    _complete_evaluation(values)
    return {name: values[name] for name in keys() if name in values}


def _example_beside(given: Mapping[str, Any]) -> dict[str, Any]:
    """`EXAMPLE` without what goes against the settings that were given."""
    left_out: set[str] = set()
    if "training.num_train_epochs" in given:
        left_out.add("training.max_steps")
    if given.get("data.evaluation_path") is not None:
        left_out.add("data.evaluation_fraction")
    elif given.get("data.evaluation_fraction") == 0:
        left_out |= {"training.eval_strategy", "training.eval_steps"}
    return {name: value for name, value in EXAMPLE.items() if name not in left_out}


def _transformers_default(name: str) -> Any:
    return getattr(TrainingArguments, name.removeprefix("training."), None)


def _checked(key: Key, value: Any) -> Any:
    if value is False and "no" in key.expected.replace(",", "").split():
        value = "no"  # which YAML reads as false
    if key.name == "strategies" and isinstance(value, list):
        require_type(key.name, key.hint, value)
        return [str(strategy) for strategy in registry.parse_all(value)]
    require_type(key.name, key.hint, value)
    return value


def _refuse_two_lengths(values: dict[str, Any]) -> None:
    steps, epochs = (values.get(f"training.{name}") for name in ("max_steps", "num_train_epochs"))
    if epochs is not None and steps is not None and steps > 0:
        raise ValueError(
            f"training.num_train_epochs={epochs!r} has no effect beside training.max_steps={steps}"
            "; leave one of them out, or set max_steps=-1"
        )


def _complete_evaluation(values: dict[str, Any]) -> None:
    """Evaluate where there is something to evaluate on, at the batch size of training."""
    has_data = bool(values["data.evaluation_path"] or values["data.evaluation_fraction"])
    strategy = values.setdefault("training.eval_strategy", "epoch" if has_data else "no")
    for name, wanted in (
        ("training.eval_strategy", strategy != "no"),
        ("training.eval_on_start", values.get("training.eval_on_start")),
    ):
        if wanted and not has_data:
            raise ValueError(
                f"{name}={values[name]!r}: there is nothing to evaluate on; set "
                "data.evaluation_path or data.evaluation_fraction"
            )
    size = values.get("training.per_device_train_batch_size")
    if has_data and size is not None:
        values.setdefault("training.per_device_eval_batch_size", size)


def _one_line(error: Any, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."
