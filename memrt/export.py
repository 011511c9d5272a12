"""Export: a folder that plain transformers loads, from a run, a checkpoint or an adapter.

Strategies undo or fold what they did to the model; state of optimizer, random numbers and
strategies stays behind. A checkpoint is never loaded as a model for that: its tensors (or those of
the base that its adapters belong to) are read, made plain and written one module at a time
(`memrt.plain_weights`, `memrt.weight_writer`). What cannot be done so is loaded whole, once:
methods of PEFT that read or start from the weights, adapters on experts that the base's files hold
one by one, and strategies of third parties.

A folder takes its name when it is whole, and only over nothing.
"""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from memrt.base_record import BASE_NAME
from memrt.checkpoint import MAX_SHARD_BYTES, SETTINGS_NAME, STATE_NAME, staged
from memrt.checkpoint_weights import cast_plan
from memrt.errors import CheckpointWriteError
from memrt.export_source import Source
from memrt.logits_check import LogitsCheck, compare_logits, logits_of, rounding_of
from memrt.plain_weights import ScatteredWeightError
from memrt.session import Session
from memrt.trainer import MemoryMixin, unwrap_mixed_precision
from memrt.weight_files import WeightFiles
from memrt.weight_writer import parse_size, write_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memrt.plain_weights import PlainWeights

__all__ = ["Exported", "export_checkpoint", "export_run", "strip"]


_RUN_FILES = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
    STATE_NAME,
    SETTINGS_NAME,
    BASE_NAME,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    path: Path
    files: tuple[str, ...]
    num_bytes: int
    """Of the weights."""
    num_parameters: int
    dtype: str
    num_folded: int
    """Layers whose adapters were folded into their weights."""
    num_unpacked: int
    """Weights that were packed, or were in the run."""
    notes: tuple[str, ...] = ()
    check: LogitsCheck | None = None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "schema": "memrt.export/1",
            "path": str(self.path),
            "files": list(self.files),
            "bytes": self.num_bytes,
            "parameters": self.num_parameters,
            "dtype": self.dtype,
            "folded_layers": self.num_folded,
            "unpacked_weights": self.num_unpacked,
            "notes": list(self.notes),
            "verify": None if self.check is None else self.check.to_json(),
        }


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
    run: Session | MemoryMixin,
    output_dir: str | Path,
    *,
    processing_class: Any = None,
    max_shard_size: str | int = MAX_SHARD_BYTES,
) -> Path:
    """Write the model of a session or Trainer as a plain transformers folder, and end the run.

    `processing_class` is the tokenizer or processor to write beside it (a Trainer's own if None).
    """
    target, max_bytes = _target(output_dir), parse_size(max_shard_size)
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
        whole.save_pretrained(folder, max_shard_size=max_bytes)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
    return target


def export_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    task: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = MAX_SHARD_BYTES,
    verify: bool = False,
    on_written: Callable[[int], None] = lambda total: None,
) -> Exported:
    """Write a checkpoint of a run, or an adapter, as a plain transformers folder.

    `base`: the folder or Hub id of the model that adapters belong to, or the model itself (which is
    taken over); None for the one that the adapters name. `task`: of the base, where its config does
    not tell (`memrt.model_source.TASKS`). `dtype`: of what is written; None keeps what is stored.
    `verify`: compare logits with the run's own model, both loaded whole, and publish nothing when
    rounding does not explain the difference. `on_written` is called with the number of tensors in
    all, for each that is written.
    """
    target, max_bytes = _target(output_dir), parse_size(max_shard_size)
    source = Source.open(checkpoint, base=base, task=task)
    reference = _reference(source) if verify else None
    with _sentence(target), staged(target) as folder:
        done = None
        if source.is_streamed:
            # found before a tensor is read, let alone written
            with suppress(ScatteredWeightError):
                done = _write_streamed(source, folder, target, dtype, max_bytes, on_written)
        if done is None:
            done = _write_whole(source, folder, target, dtype, max_bytes)
        _copy_files(source, folder)
        if reference is not None:
            done = replace(done, check=_checked(folder, *reference))
    return done


# ---------------------------------------------------------------- writing


def _write_streamed(
    source: Source,
    folder: Path,
    target: Path,
    dtype: torch.dtype | None,
    max_bytes: int,
    on_written: Callable[[int], None],
) -> Exported:
    with WeightFiles(source.weight_source()) as files, torch.no_grad():
        weights = source.plain_weights(files, dtype)
        entries = weights.entries
        num_bytes = sum(entry.num_bytes for entry in entries)
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise OSError(
                f"the weights take {num_bytes / 2**30:.2f} GiB and the disk of {target} has "
                f"{free / 2**30:.2f} GiB free"
            )
        total = len(entries)
        names = write_shards(
            folder,
            entries,
            weights.tensor,
            max_bytes=max_bytes,
            on_written=lambda: on_written(total),
        )
        _write_config(weights, folder)
    return Exported(
        path=target,
        files=tuple(names),
        num_bytes=num_bytes,
        num_parameters=sum(torch.Size(entry.shape).numel() for entry in entries),
        dtype=str(weights.common_dtype).removeprefix("torch."),
        num_folded=weights.num_folded,
        num_unpacked=weights.num_unpacked,
        notes=(*source.notes, *weights.notes),
    )


def _write_config(weights: PlainWeights, folder: Path) -> None:
    model = weights.model
    config = copy.deepcopy(model.config)
    config.dtype = weights.common_dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_whole(
    source: Source, folder: Path, target: Path, dtype: torch.dtype | None, max_bytes: int
) -> Exported:
    model, num_folded, num_unpacked = source.stripped_model()
    if dtype is not None:
        dtype_of = cast_plan(model, dtype)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.to(dtype_of(name, dtype))
        model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_bytes)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    return Exported(
        path=target,
        files=tuple(files),
        num_bytes=sum((folder / name).stat().st_size for name in files),
        num_parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        num_folded=num_folded,
        num_unpacked=num_unpacked,
        notes=source.notes,
    )


def _copy_files(source: Source, folder: Path) -> None:
    """The checkpoint's other files, its tokenizer say; the base's where it has none."""
    for name, path in source.other_files(skip=(*_RUN_FILES, *_MODEL_FILES)).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / name)


@contextmanager
def _sentence(target: Path) -> Iterator[None]:
    """Say what a disk's refusal means here; the checkpoint's sentence is about a run."""
    try:
        yield
    except CheckpointWriteError as error:
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or str(cause)
        raise OSError(
            f"{target} could not be written ({reason}); nothing of it is left: free space, or "
            "name a folder on another disk"
        ) from error


# ---------------------------------------------------------------- verifying


def _reference(source: Source) -> tuple[torch.Tensor, float]:
    """Logits of the run's own model, and how far rounding moves them."""
    model = source.run_model()
    logits = logits_of(model)
    return logits, rounding_of(model, logits)


def _checked(folder: Path, reference: torch.Tensor, rounding: float) -> LogitsCheck:
    kind = getattr(
        transformers, json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
    )
    model, loading = kind.from_pretrained(folder, output_loading_info=True)
    odd = {name: found for name, found in loading.items() if found and name != "error_msgs"}
    if odd:
        raise ValueError(
            f"verify=True: plain transformers finds {next(iter(odd))} in what was written "
            f"({sorted(map(str, next(iter(odd.values()))))[0]}); nothing was kept"
        )
    check = compare_logits(reference, model, rounding=rounding)
    if not check.passed:
        raise ValueError(
            f"verify=True: the exported model does not compute what the run's model computed: "
            f"{check}; nothing was kept"
        )
    return check
