"""What an export begins with: a checkpoint of a run, or adapters and the base they belong to."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memrt.adapter_folding import fold_adapters
from memrt.adapters import (
    adapter_layers,
    has_adapter_files,
    inject,
    load_adapters,
    read_adapters,
    reads_base_weights,
    remove_adapters,
    task_heads,
)
from memrt.base_record import BaseRecord, require_base
from memrt.checkpoint import load_state, read_strategies
from memrt.export_files import other_files
from memrt.initialization import Skeleton
from memrt.loading import load
from memrt.model_source import WeightSource, auto_class, resolve_config, weight_source
from memrt.packed_strategy import PackedStrategy
from memrt.packed_weights import packed_layers
from memrt.plain_weights import PlainWeights
from memrt.session import Session
from memrt.weight_files import WeightFiles, assign

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memrt.strategy import Strategy

__all__ = ["Source"]

_REMEDY = "name the base that they were trained on"

_LADDER_FILE = "ladder.json"
_LADDER = (
    "a ladder's side network cannot be folded into the model's own weights; write it with "
    "memrt.save_ladder(session, folder) and put it on its backbone with "
    "memrt.load_ladder(model, folder)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A folder that was found fit to export; nothing but its small files is read yet."""

    folder: Path
    strategies: Sequence[Strategy]
    adapter_config: Any
    """PEFT's, or None for a checkpoint with a model's own weights."""
    base: str | Path | nn.Module | None
    """The model that the adapters belong to."""
    task: str | None
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: str | Path, *, base: Any, task: str | None) -> Source:
        """Look at a folder; `ValueError` for one that is no checkpoint or cannot be exported."""
        source = Path(folder)
        _require_folder(source)
        strategies = read_strategies(source)
        if any(strategy.name == "ladder" for strategy in strategies):
            raise ValueError(_LADDER)
        if not has_adapter_files(source):
            if base is not None:
                raise ValueError(
                    f"base={base!r}: {source} holds a whole model, so base has no effect; "
                    "leave it out"
                )
            _require_model(source)
            _kind(resolve_config(source), source)
            return cls(
                folder=source, strategies=strategies, adapter_config=None, base=None, task=task
            )
        config = _adapter_config(source)
        named = config.base_model_name_or_path or None
        if base is None and not named:
            raise ValueError(
                f"base=None: {source} holds adapters alone and does not name the model that they "
                "belong to; give that model, or its folder, as base"
            )
        return cls(
            folder=source,
            strategies=strategies,
            adapter_config=config,
            base=named if base is None else base,
            task=task or _task(config),
        )

    @property
    def packed(self) -> list[PackedStrategy]:
        """The strategies that keep weights packed."""
        return [each for each in self.strategies if isinstance(each, PackedStrategy)]

    @property
    def is_streamed(self) -> bool:
        """Whether everything that an export undoes can be undone one module at a time."""
        own = all(type(each).__module__.startswith("memrt.strategies.") for each in self.strategies)
        plain = self.adapter_config is None or reads_base_weights(self.adapter_config) is None
        return own and plain and not isinstance(self.base, nn.Module)

    # ------------------------------------------------------------ one module at a time

    def weight_source(self) -> WeightSource:
        """The files with the weights: the checkpoint's, or the base's."""
        where: Any = self.folder if self.adapter_config is None else self.base
        found = weight_source(where, self._config())
        if found is None:
            raise ValueError(f"{str(where)!r} holds no weights; name a folder with safetensors")
        return found

    def plain_weights(self, files: WeightFiles, dtype: torch.dtype | None) -> PlainWeights:
        """The plain model's tensors."""
        config = self._config()
        stored = getattr(config, "dtype", None) or files.common_dtype()
        if self.adapter_config is None:
            kind = _kind(config, self.folder)
            skeleton = Skeleton.build(lambda: kind._from_config(config, dtype=stored))
        else:
            auto = auto_class(config, self.task)
            skeleton = Skeleton.build(lambda: auto.from_config(config, dtype=stored))
        return PlainWeights(
            files=files,
            model=skeleton.model,
            packed=self.packed,
            adapters=None if self.adapter_config is None else self.folder,
            adapter_config=copy.deepcopy(self.adapter_config),
            dtype=dtype,
        )

    def _config(self) -> Any:
        config = copy.deepcopy(
            resolve_config(self.folder if self.adapter_config is None else self.base)
        )
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{self.base or self.folder}: its weights are quantised by another library; name "
                "the model that it was made from"
            )
        if self.adapter_config is not None:
            _take_labels(config, self.folder, self.task)
        return config

    # ------------------------------------------------------------ whole models

    def run_model(self) -> Any:
        """The model as the run computed with it: packed, its adapters beside the weights."""
        if self.adapter_config is not None:
            if isinstance(self.base, nn.Module):
                raise ValueError(
                    "verify=True: needs base as a folder, for the run's model is built on it too"
                )
            with warnings.catch_warnings():
                # of its head: adapters bring one, and the export itself says what it lacks
                warnings.filterwarnings("ignore", message=".*the checkpoint (lacks|holds) weights")
                model = self._base_model(self.packed)
            inject(copy.deepcopy(self.adapter_config), model)
            load_adapters(model, self.folder, remedy=_REMEDY)
            require_base(model, self.folder)
            return model
        whole: nn.Module = self._loaded()
        if self.packed:
            Session(whole, self.packed)
            _fill(whole, self.folder)
        return whole

    def stripped_model(self) -> tuple[Any, int, int]:
        """The plain model, whole; how many layers were folded, how many weights unpacked."""
        if self.adapter_config is None:
            model: Any = self._loaded()
            session = Session(model, self.strategies)
            if self.packed:
                _fill(model, self.folder)
            session.load_strategy_state(load_state(self.folder, self.strategies))
            unpacked = len(packed_layers(model))
            return session.export(), 0, unpacked
        model = self.base if isinstance(self.base, nn.Module) else self._base_model()
        if not self.strategies:
            before = inject(copy.deepcopy(self.adapter_config), model)
            load_adapters(model, self.folder, remedy=_REMEDY)
            require_base(model, self.folder)
            folded = len(adapter_layers(model))
            fold_adapters(model)
            remove_adapters(model, before)
            return model, folded, 0
        session = Session(model, self.strategies)
        load_adapters(model, self.folder, remedy=_REMEDY)
        require_base(model, self.folder)
        session.load_strategy_state(load_state(self.folder, self.strategies))
        folded, unpacked = len(adapter_layers(model)), len(packed_layers(model))
        return session.export(), folded, unpacked

    def _base_model(self, packed: Sequence[Strategy] = ()) -> Any:
        """The base; a head with other labels than that of the adapters is left out."""
        config, own = self._config(), resolve_config(self.base)
        if "Classification" not in str(own.architectures) or own.num_labels == config.num_labels:
            return load(str(self.base), packed, task=self.task, config=config)
        if packed:
            raise ValueError("verify=True: over packed weights the base's head needs equal labels")
        model, loading = auto_class(config, self.task).from_pretrained(
            str(self.base), config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        heads = tuple(f"{name}." for name in task_heads(model))
        for name, found, wanted in loading["mismatched_keys"]:
            if not name.startswith(heads):
                raise ValueError(f"{self.base}: {name!r} is {list(found)}, not {list(wanted)}")
        return model

    def _loaded(self) -> Any:
        """The model of a checkpoint; its weights come later where strategies keep them packed."""
        config = self._config()
        kind = _kind(config, self.folder)
        if not self.packed:
            return kind.from_pretrained(self.folder)
        model = kind._from_config(config)
        with WeightFiles(self.weight_source()) as files:
            plain = assign(model, files, lambda key, name: files.read(key)).plain
            # what else was frozen does not matter here: frozen ones alone would be packed
            for name, parameter in model.named_parameters():
                if name in plain and not files.stored_dtype(plain[name]).is_floating_point:
                    parameter.requires_grad_(False)
        return model

    # ------------------------------------------------------------ other files

    def other_files(self, *, skip: Sequence[str]) -> dict[str, Path]:
        """What goes along, by its name in the export."""
        return other_files(
            self.folder,
            base=None if isinstance(self.base, nn.Module) else self.base,
            has_adapters=self.adapter_config is not None,
            skip=skip,
        )


def _require_folder(source: Path) -> None:
    if not source.exists():
        raise ValueError(f"{str(source)!r}: there is no such folder")
    if not source.is_dir():
        raise ValueError(f"{str(source)!r} is a file; name the checkpoint's folder")
    if (source / _LADDER_FILE).is_file():
        raise ValueError(_LADDER)
    if (source / "adapter_model.bin").is_file() and not has_adapter_files(source):
        raise ValueError(
            f"{source} holds its adapters as adapter_model.bin, a pickle; save them again with "
            "safe_serialization=True"
        )


def _require_model(source: Path) -> None:
    if (source / "config.json").is_file():
        return
    inside = sorted(source.glob("checkpoint-*"), key=lambda path: path.name)
    raise ValueError(
        f"{source} has no config.json"
        + (
            f"; it is a run's folder, name one of its checkpoints, such as {inside[-1].name}"
            if inside
            else "; name a checkpoint of a transformers run, or an adapter's folder"
        )
    )


def _adapter_config(source: Path) -> Any:
    from peft import PeftConfig

    path = source / "adapter_config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
        config: Any = PeftConfig.from_pretrained(str(source))
    except FileNotFoundError:
        raise ValueError(f"{source} has adapter_model.safetensors but no {path.name}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged, or of a newer PEFT ({text})") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"{source} holds PEFT's {kind}, which adds to the input and not to the weights; keep "
            "it and load it with peft.PeftModel.from_pretrained"
        )
    return config


_TASKS = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "CAUSAL_LM": "causal-lm",
}


def _task(config: Any) -> str | None:
    """The task that an adapter says it was trained for."""
    named = getattr(config.task_type, "value", config.task_type)
    return _TASKS.get(str(named))


def _take_labels(config: Any, adapters: Path, task: str | None) -> None:
    """Those of the head that was saved with the adapters: a base may know of none.

    A folder of PEFT's tells how many there are, and not their names.
    """
    auto = auto_class(config, task)
    if "Classification" not in auto.__name__:
        return
    record = BaseRecord.read(adapters)
    if record is not None and record.head_config is not None:
        record.head_config.write_to(config)
        return
    saved = {name: tensor.shape for name, tensor in read_adapters(adapters).items()}
    model: Any = Skeleton.build(lambda: auto.from_config(config)).model
    heads = tuple(f"{name}." for name in task_heads(model))
    for name, parameter in model.named_parameters():
        own, found = parameter.shape, saved.get(name)
        if found is None or not name.startswith(heads):
            continue
        if own[0] == config.num_labels != found[0] and own[1:] == found[1:]:
            config.num_labels = found[0]
            return


def _kind(config: Any, folder: Path) -> Any:
    import transformers

    names = config.architectures or [""]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise ValueError(
            f"config.architectures={names} of {folder} is no class of transformers "
            f"{transformers.__version__}; load the model yourself and call export_run"
        )
    return kind


def _fill(model: nn.Module, checkpoint: Path) -> None:
    """The tensors of a checkpoint, packed ones as they are, into a model of their shapes."""
    state = dict(model.state_dict(keep_vars=True))
    source = weight_source(checkpoint, model.config)
    assert source is not None
    with WeightFiles(source) as files, torch.no_grad():
        for key in files:
            if key in state:
                state[key].copy_(files.read(key))
    model.tie_weights()  # type: ignore[operator]
