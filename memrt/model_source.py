"""What `memrt.load` is pointed at: a config, the model class for a task, the files with weights.

Accepted: a local folder with `config.json` (and safetensors, or none: random weights), a path to a
`config.json` (random weights), a transformers config object (random weights), a Hub id. Everything
else is one `ValueError` with the remedy. Only safetensors are read: their headers can be checked
and a tensor can be read alone, while a pickled `.bin` runs code when it is opened.
"""

from __future__ import annotations

import copy
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

__all__ = [
    "CLASSIFICATION",
    "TASKS",
    "WeightSource",
    "auto_class",
    "brings_code",
    "class_names",
    "for_task",
    "hub_answers",
    "resolve_config",
    "task_of",
    "weight_source",
]

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}

CLASSIFICATION = "sequence-classification"

_CONNECT_SECONDS = 5.0
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OTHER_WEIGHTS = (
    "pytorch_model*.bin",
    "model*.bin",
    "model*.pt*",
    "consolidated*.pth",
    "*.ckpt*",
    "*.gguf",
    "*.h5",
    "*.msgpack",
)
_CONVERT = (
    "memrt.load reads safetensors; convert once with "
    "AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Safetensors files, and which of them holds a tensor where an index says so."""

    files: tuple[Path, ...]
    index: dict[str, Path]


def _short(error: Exception, limit: int = 200) -> str:
    """An error of another library on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _local_config(path: Path) -> Path:
    """The config file behind a local path."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return path / "config.json"
        raise ValueError(f"{str(path)!r} has no config.json; point at a folder that has one")
    if path.suffix != ".json":
        raise ValueError(
            f"{str(path)!r} is neither a folder nor a config.json; "
            "point at the folder that holds config.json and the weights"
        )
    return path


def _hub_config(name: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{name!r} is not a local path; check the spelling and the working folder")
    try:
        found: dict[str, Any] = PreTrainedConfig.get_config_dict(
            name, local_files_only=not hub_answers()
        )[0]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is neither a local path nor reachable on the Hub ({_short(error)}); "
            "check the name and the network, or download it first and pass the folder"
        ) from error
    if not found:
        raise ValueError(f"{name!r} on the Hub has no config.json")
    return found


def hub_answers() -> bool:
    """Whether the Hub takes connections: its client tries again and again for half a minute.

    Behind a proxy nobody can tell; the client finds out.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies().keys() & {"http", "https", "all"}:
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({_short(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def resolve_config(path_or_config: Any, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a path, a Hub id or a config object; needs no weights."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    if isinstance(path_or_config, PreTrainedConfig):
        return path_or_config
    if not isinstance(path_or_config, (str, Path)):
        raise ValueError(
            f"path_or_config={path_or_config!r}: must be a path, a Hub id or a transformers config"
        )
    name = str(path_or_config)
    local = name != "" and Path(name).exists()
    values = _read_json(_local_config(Path(name))) if local else _hub_config(name)
    model_type = values.get("model_type")
    if "AutoConfig" in (values.get("auto_map") or {}):
        if model_type not in CONFIG_MAPPING and not trust_remote_code:
            raise ValueError(
                f"{name!r} brings its own Python code for its config; "
                "read it, then pass trust_remote_code=True"
            )
    elif model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name!r}: config.json has model_type={model_type!r}, which transformers does not know"
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{name!r}: {_short(error)}") from error


def _class_names(auto: Any, config: Any) -> set[str]:
    """Model classes that an auto class has for a config."""
    if type(config) not in auto._model_mapping:
        return set()
    found = auto._model_mapping[type(config)]
    return {cls.__name__ for cls in (found if isinstance(found, tuple) else (found,))}


def _tasks_of(config: Any) -> dict[str, set[str]]:
    """Tasks that a config has a class for, with the names of those classes."""
    import transformers

    remote = getattr(config, "auto_map", None) or {}
    found = {}
    for task, auto_name in TASKS.items():
        names = _class_names(getattr(transformers, auto_name), config)
        if auto_name in remote:
            names.add(str(remote[auto_name]).rsplit(".", 1)[-1])
        if names:
            found[task] = names
    return found


def auto_class(config: Any, task: str | None = None) -> Any:
    """The transformers auto class for a config and a task; without one, for `task_of(config)`."""
    import transformers

    return getattr(transformers, TASKS[task_of(config, task)])


def task_of(config: Any, task: str | None = None) -> str:
    """The task itself, if the family has a class for it; None: what the config is for.

    `config.architectures` decides; where it names none of the classes that memrt trains, what the
    family is for: sequence to sequence, masked, causal, then the others.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task={task!r}: must be one of {', '.join(TASKS)}")
    tasks = _tasks_of(config)
    family = f"model_type {config.model_type!r}"
    if task is not None and task not in tasks:
        raise ValueError(
            f"task={task!r}: transformers has no such class for {family} "
            f"(it has: {', '.join(tasks) or 'none that memrt trains'})"
        )
    if not tasks:
        raise ValueError(
            f"{family} has no class for any of {', '.join(TASKS)}; "
            "build the model yourself and use memrt.prepare"
        )
    return task or _usual_task(config, tasks)


def class_names(config: Any, task: str) -> set[str]:
    """The model classes of a config for a task."""
    return _tasks_of(config).get(task, set())


def for_task(config: Any, task: str) -> Any:
    """A copy of a config that names a class for the task, and so is for it."""
    names = class_names(config, task_of(config, task))
    found = copy.deepcopy(config)
    if not names & set(getattr(config, "architectures", None) or ()):
        found.architectures = [min(names)]
    return found


def brings_code(config: Any, auto: Any) -> str | None:
    """Why a model runs Python code of its own, or None where transformers has its class."""
    if type(config) in auto._model_mapping:
        return None
    return (
        f"model_type {config.model_type!r} brings its own Python code for {auto.__name__}; read "
        "it, then pass trust_remote_code=True"
    )


def _usual_task(config: Any, tasks: dict[str, set[str]]) -> str:
    architectures = set(getattr(config, "architectures", None) or ())
    for task, names in tasks.items():
        if architectures & names:
            return task
    order = ["causal-lm", *tasks]
    if not getattr(config, "is_decoder", False):  # BERT and its kin also have a causal class
        order.insert(0, "masked-lm")
    if getattr(config, "is_encoder_decoder", False):
        order.insert(0, "seq2seq-lm")
    return next(task for task in order if task in tasks)


def _fetch(name: str, filename: str, config: Any) -> Path | None:
    """A file of a local folder or of a Hub repository; None where it has no such file."""
    if Path(filename).name != filename:
        raise ValueError(f"{name!r}: {filename!r} lies outside the model's folder; refused")
    if Path(name).is_dir():
        path = Path(name) / filename
        return path if path.is_file() else None
    from transformers.utils import cached_file

    revision = getattr(config, "_commit_hash", None) or "main"
    try:
        found = cached_file(
            name, filename, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:
        raise ValueError(
            f"{name!r}: {filename!r} could not be fetched ({_short(error)})"
        ) from error
    return None if found is None else Path(found)


def _from_index(name: str, path: Path, config: Any) -> WeightSource:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: has no weight_map; the index is damaged")
    shards: dict[str, Path] = {}
    for filename in sorted(set(weight_map.values())):
        shard = _fetch(name, filename, config)
        if shard is None:
            missing = next(key for key, value in weight_map.items() if value == filename)
            raise ValueError(
                f"{name!r}: shard {filename!r} is missing (it holds {missing!r}); "
                "copy or download it again"
            )
        shards[filename] = shard
    index = {key: shards[filename] for key, filename in weight_map.items()}
    return WeightSource(files=tuple(shards.values()), index=index)


def weight_source(path_or_config: Any, config: Any) -> WeightSource | None:
    """Where the weights are; None where there are none and random ones are meant."""
    if not isinstance(path_or_config, (str, Path)) or Path(path_or_config).is_file():
        return None
    name = str(path_or_config)
    if _fetch(name, "adapter_config.json", config) is not None:
        raise ValueError(
            f"{name!r} holds a PEFT adapter; load the base model, add the adapter with peft and "
            "use memrt.prepare"
        )
    filename = getattr(config, "transformers_weights", None) or "model.safetensors"
    if filename.endswith(".safetensors"):
        single = _fetch(name, filename, config)
        if single is not None:
            parts = getattr(type(config), "extra_files", ())
            extra = [_fetch(name, part, config) for part in parts]
            return WeightSource(files=(single, *(p for p in extra if p is not None)), index={})
        filename = "model.safetensors.index.json"
    path = _fetch(name, filename, config)
    if path is not None:
        return _from_index(name, path, config)
    if not Path(name).is_dir():
        raise ValueError(
            f"{name!r}: no model.safetensors on the Hub (without network: in its cache); {_CONVERT}"
        )
    stray = sorted(p.name for p in Path(name).glob("*.safetensors"))
    if stray:
        raise ValueError(
            f"{name!r} holds {stray[0]} but neither {filename} nor model.safetensors; "
            "copy or download the missing file"
        )
    others = sorted({p.name for pattern in _OTHER_WEIGHTS for p in Path(name).glob(pattern)})
    if others:
        raise ValueError(f"{name!r} holds weights as {', '.join(others[:3])}; {_CONVERT}")
    return None
