"""Export: a folder that plain transformers loads, from a run or from one of its checkpoints.

Strategies undo or fold what they did to the model (`Session.export`); state of optimizer, random
numbers and strategies stays behind. The tensors are those of the trained model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.trainer_utils import load_sharded_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from memrt.adapters import has_adapter_files, load_adapters
from memrt.checkpoint import SETTINGS_NAME, STATE_NAME, load_state, read_strategies, staged
from memrt.loading import load
from memrt.packed_strategy import PackedStrategy
from memrt.packed_weights import packable
from memrt.session import Session
from memrt.structure import Facts, RunSettings, discover
from memrt.trainer import MemoryMixin, unwrap_mixed_precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memrt.strategy import Strategy

__all__ = ["export_checkpoint", "export_run", "strip"]

_RUN_FILES = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
    STATE_NAME,
    SETTINGS_NAME,
)
# written anew from the exported model
_MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)


def strip(run: Session) -> nn.Module:
    """End a run: its model, in the form that plain transformers loads."""
    unwrap_mixed_precision(run.model)
    return run.export()


def _target(output_dir: str | Path) -> Path:
    target = Path(output_dir).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir={str(output_dir)!r} is taken; name a new or empty folder")
    return target


def export_run(
    run: Session | MemoryMixin, output_dir: str | Path, *, processing_class: Any = None
) -> Path:
    """Write the model of a session or Trainer as a plain transformers folder, and end the run.

    `processing_class` is the tokenizer or processor to write beside it (a Trainer's own if None).
    """
    target = _target(output_dir)
    if isinstance(run, MemoryMixin):
        session, whole = run.session, run._bare_model()
        processing_class = processing_class or run.processing_class
    else:
        session, whole = run, run.model
    if not isinstance(whole, transformers.PreTrainedModel):
        raise ValueError(
            f"{type(whole).__name__} is not a transformers model, so no folder can be written that "
            "from_pretrained loads; save memrt.export.strip(run).state_dict() yourself"
        )
    with staged(target) as folder:
        if session is None:
            unwrap_mixed_precision(whole)
        else:
            strip(session)
        whole.save_pretrained(folder)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
    return target


def _base(checkpoint: Path, base: str | Path | nn.Module | None) -> nn.Module:
    """The model that a checkpoint's adapters belong to."""
    if isinstance(base, nn.Module):
        return base
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise ValueError(
            f"base=None: {checkpoint} holds adapters alone and does not name the model that they "
            "belong to; give that model, or its folder, as base"
        )
    return load(named)


def _load(checkpoint: Path, strategies: Sequence[Strategy]) -> Any:
    """The model of a checkpoint; its weights come later where strategies keep them packed."""
    if not (checkpoint / "config.json").is_file():
        raise ValueError(
            f"{checkpoint} has no config.json; name a checkpoint of a transformers run"
        )
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    names = config.architectures or [""]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise ValueError(
            f"config.architectures={names} of {checkpoint} is no class of transformers "
            f"{transformers.__version__}; load the model yourself and call export_run"
        )
    if not _packs(strategies):
        return kind.from_pretrained(checkpoint)
    model = kind(config)
    names = packable(Facts(model=model, structure=discover(model), settings=RunSettings()))
    for name in names:  # what trained does not matter here, that something did does
        model.get_submodule(name).weight.requires_grad_(False)
    return model


def _packs(strategies: Sequence[Strategy]) -> bool:
    return any(isinstance(strategy, PackedStrategy) for strategy in strategies)


def _fill(model: nn.Module, checkpoint: Path) -> None:
    """The tensors of a checkpoint, packed ones as they are, into a model of their shapes."""
    whole = checkpoint / SAFE_WEIGHTS_NAME
    if whole.is_file():
        model.load_state_dict(load_file(whole), strict=False)
        model.tie_weights()  # type: ignore[operator]
    else:
        load_sharded_checkpoint(model, str(checkpoint), strict=False)


def export_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
) -> Path:
    """Write a checkpoint folder of a run as a plain transformers folder.

    The strategies that wrote it are attached again, given their state and asked to export. A folder
    with adapters alone is folded into `base`, the model (which is taken over) or the folder that
    the run began with; None for the one that the adapters name.
    """
    source, target = Path(checkpoint), _target(output_dir)
    adapters = has_adapter_files(source)
    strategies = read_strategies(source)
    model: Any = _base(source, base) if adapters else _load(source, strategies)
    if strategies:
        session = Session(model, strategies)
        if adapters:
            load_adapters(model, source)
        elif _packs(strategies):
            _fill(model, source)
        session.load_strategy_state(load_state(source, strategies))
        model = strip(session)
    with staged(target) as folder:
        model.save_pretrained(folder)
        for path in sorted(source.iterdir()):
            if path.is_file() and not any(map(path.match, (*_RUN_FILES, *_MODEL_FILES))):
                shutil.copy(path, folder)
    return target
