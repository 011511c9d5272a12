"""Checkpoints that survive a crash, and the strategies' state beside them.

A folder is written under a temporary name, flushed to the disk, then renamed: whoever lists the run
sees a whole checkpoint or none. When the final name is taken, the folder that has it is renamed
aside first, and gets its name back (`recover`) if the process dies between the two renames.

    checkpoint-N/             transformers' files, unchanged; of a frozen model that adapters or a
                              side network train beside, these alone and a hash of that model
        memrt_state.json      version, step, strategies and their settings; read before the rest
        memrt_state.pt        the strategies' state: tensors and numbers, loaded `weights_only`
"""

from __future__ import annotations

import json
import os
import shutil
import weakref
from contextlib import contextmanager
from dataclasses import replace
from glob import escape
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.utils.serialization import config as serialization
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints

from memrt.adapters import has_adapter_files, load_adapters
from memrt.base_record import base_record, require_base
from memrt.checkpoint_loading import (
    TRAINER_STATE_NAME,
    has_weight_files,
    load_weights,
    require_readable,
)
from memrt.checkpoint_saving import MAX_SHARD_BYTES, saving, write_json, write_text
from memrt.errors import CheckpointWriteError
from memrt.head_config import HeadConfig
from memrt.registry import from_json
from memrt.saved_settings import check_settings
from memrt.session import STATE_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import Trainer as _Trainer

    from memrt.base_record import BaseRecord
    from memrt.session import Session
    from memrt.strategy import Attachment, Strategy
else:
    _Trainer = object

__all__ = [
    "MAX_SHARD_BYTES",
    "SETTINGS_NAME",
    "STATE_NAME",
    "CheckpointMixin",
    "check_state",
    "load_state",
    "read_strategies",
    "recover",
    "save_state",
    "staged",
    "write_json",
    "write_text",
]

STATE_NAME = "memrt_state.pt"
SETTINGS_NAME = "memrt_state.json"

# Neither matches transformers' `^checkpoint-(\d+)$`, and the leading underscore is in the list of
# names that its Trainer never uploads.
_STAGING = "_memrt-tmp-"
_SUPERSEDED = "_memrt-old-"


# -------------------------------------------------------------------- whole folders or none


def recover(run_folder: Path, *, pattern: str = "checkpoint-*") -> None:
    """Undo what a killed save left: drop unfinished folders, give superseded ones their name."""
    for leftover in run_folder.glob(f"{_STAGING}{pattern}"):
        shutil.rmtree(leftover)
    for superseded in run_folder.glob(f"{_SUPERSEDED}{pattern}"):
        final = superseded.with_name(superseded.name.removeprefix(_SUPERSEDED))
        if final.exists():
            shutil.rmtree(superseded)
        else:
            superseded.rename(final)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(folder: Path, final: Path) -> None:
    """Flush `folder` and everything in it, then give it the name `final`."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _flush(Path(parent) / name)
        _flush(Path(parent))
    superseded = final.with_name(f"{_SUPERSEDED}{final.name}")
    if final.exists():
        final.rename(superseded)
    folder.rename(final)
    _flush(final.parent)
    if superseded.exists():
        shutil.rmtree(superseded)


def _is_write_failure(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):  # how torch's zip writer reports a full disk
        return "inline_container" in str(error)
    return isinstance(error, (OSError, SafetensorError))


@contextmanager
def staged(
    final: Path, *, writes: bool = True, wait: Callable[[], object] | None = None
) -> Iterator[Path]:
    """A folder to fill, which takes the name `final` when the block ends and is gone if it fails.

    `writes` is whether this process makes and renames it, `wait` a barrier of all processes. Raises
    `CheckpointWriteError` when the disk refuses.
    """
    wait = wait or (lambda: None)
    holder = final.parent / f"{_STAGING}{final.name}"
    folder = holder / final.name
    try:
        if writes:
            recover(final.parent, pattern=escape(final.name))
            folder.mkdir(parents=True)
        wait()
        yield folder
        wait()
        if writes:
            _publish(folder, final)
            holder.rmdir()
        wait()
    except BaseException as error:
        if writes:
            recover(final.parent, pattern=escape(final.name))
        if not _is_write_failure(error):
            raise
        disk = next(parent for parent in final.absolute().parents if parent.is_dir())
        raise CheckpointWriteError(
            folder=str(final), free_bytes=shutil.disk_usage(disk).free, cause=error
        ) from error


# -------------------------------------------------------------------- the strategies' state


def save_state(folder: Path, session: Session) -> None:
    """Write the strategies' settings and state into a checkpoint folder, each file atomically."""
    from memrt import __version__

    state = session.strategy_state()
    temporary = folder / f"{STATE_NAME}.tmp"
    torch.save(state, temporary)
    temporary.replace(folder / STATE_NAME)
    write_json(
        folder / SETTINGS_NAME,
        {
            "version": STATE_VERSION,
            "memrt": __version__,
            "step": state["step"],
            "strategies": state["settings"],
        },
    )


def _settings(folder: Path) -> dict[str, Any] | None:
    path = folder / SETTINGS_NAME
    if not path.is_file():
        return None
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings["version"], settings["strategies"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    if settings["version"] != STATE_VERSION:
        raise ValueError(
            f"{path} has version {settings['version']!r}, this memrt reads {STATE_VERSION}; resume "
            f"with memrt {settings.get('memrt', 'of the version that wrote it')}"
        )
    return settings


def read_strategies(folder: Path) -> list[Strategy]:
    """The strategies that a checkpoint was written with; none for a checkpoint of transformers."""
    settings = _settings(folder)
    return [] if settings is None else [from_json(each) for each in settings["strategies"]]


def check_state(folder: Path, strategies: Sequence[Strategy]) -> None:
    """Refuse a checkpoint of other strategies or other settings; reads one small file.

    Settings of `exact` strategies may differ: they change no number.
    """
    if not folder.is_dir():
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r}: there is no such folder; name a checkpoint-N "
            "of a run, or True for the last one"
        )
    settings = _settings(folder)
    written = [] if settings is None else settings["strategies"]
    check_settings(written, strategies, source=str(folder))


def load_state(
    folder: Path, strategies: Sequence[Strategy], *, mapped: bool = False
) -> dict[str, Any]:
    """The strategies' state of a checkpoint, checked against the strategies of this run.

    `mapped`: its tensors lie in the file until they are copied, as a device does; on a CPU, where
    they are used as they are, they would keep the file open.
    """
    check_state(folder, strategies)
    path = folder / STATE_NAME
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; resume from another checkpoint") from None
    except (OSError, EOFError, RuntimeError, UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    return state


# -------------------------------------------------------------------- under transformers' Trainer


class CheckpointMixin(_Trainer):  # type: ignore[misc]
    """How a Trainer writes a checkpoint and resumes from it."""

    session: Session | None = None
    """None when there is neither a strategy nor a memory report."""
    _strategies: Sequence[Strategy] = ()
    _staging: str | None = None
    _last_checkpoint: str | None = None
    _resuming: dict[str, Any] | None = None
    _recorded: tuple[weakref.ref[nn.Module], BaseRecord] | None = None

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, the folder that stands in for the run's."""
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a temporary folder and rename: a kill at any moment leaves whole ones only."""
        run_folder = self._get_output_dir(trial)
        final = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        best, writes = self.state.best_model_checkpoint, self.args.should_save
        if writes:
            recover(Path(run_folder))
        everyone = self.accelerator.wait_for_everyone
        try:
            with staged(Path(final), writes=writes, wait=everyone) as folder:
                self._staging = str(folder.parent)
                super()._save_checkpoint(model, trial)
                self.state.best_model_checkpoint = self._best_checkpoint(run_folder, best)
                if writes:  # transformers wrote it with the temporary folder's name
                    self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        except BaseException:
            self.state.best_model_checkpoint = best
            raise
        finally:
            self._staging = None
        self._last_checkpoint = final
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if writes:
            rotate_checkpoints(
                output_dir=run_folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _best_checkpoint(self, run_folder: str, before: str | None) -> str | None:
        step = self.state.best_global_step
        if self.args.save_strategy == SaveStrategy.NO or not step:
            return before
        best = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        return best if step == self.state.global_step or os.path.exists(best) else before

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # otherwise it is pushed later, under its final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """transformers' `_save`: in small files, or of a frozen model what stands beside it."""
        with saving(self._bare_model(), self._standing_alone()):
            super()._save(output_dir, *args, **kwargs)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._has_own_adapters(folder) and not self._is_sharded:
            self._record_of_base().write(folder)

    def _standing_alone(self) -> list[Attachment]:
        """Strategies whose tensors are no part of any plain model."""
        attached = [] if self.session is None or self._is_sharded else self.session.attachments
        return [each for each in attached if each.apart == "must"]

    def _record_of_base(self) -> BaseRecord:
        """What the adapters know their base by; a frozen base is looked at once."""
        model = self._bare_model()
        if self._recorded is None or self._recorded[0]() is not model:
            self._recorded = weakref.ref(model), base_record(model)
        # transformers writes the kind of a classifier into its config in the first forward
        return replace(self._recorded[1], head_config=HeadConfig.of(model))

    def _bare_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._strategies and self.args.should_save:
            assert self.session is not None
            save_state(Path(output_dir), self.session)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Weights; refused before they are read when other strategies wrote the checkpoint."""
        folder = Path(resume_from_checkpoint)
        check_state(folder, self._strategies)
        require_readable(folder, exact=bool(self._strategies) and not self._is_sharded)
        if self._strategies:
            self._resuming = load_state(folder, self._strategies, mapped=self._has_device)
        whole = not self._load_beside(folder)
        if whole and self._streams_weights(folder) and not (args or kwargs):
            load_weights(self.model, folder)
        elif whole:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self._last_checkpoint = resume_from_checkpoint

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and self._load_beside(Path(best)):
            return
        if best is not None and self._streams_weights(Path(best)):
            load_weights(self.model, Path(best))
        else:
            super()._load_best_model()

    def _load_beside(self, folder: Path) -> bool:
        """What stands beside a frozen model, if the folder holds such; refuses another model."""
        if not self._has_own_adapters(folder):
            return any(each.load_apart(folder) for each in self._standing_alone())
        if not self._is_sharded:
            require_base(self._bare_model(), folder)
        load_adapters(self.model, folder)
        return True

    def _streams_weights(self, folder: Path) -> bool:
        """Whether a whole model lies in safetensors and this process has the whole model."""
        adapted = hasattr(self.model, "peft_config")  # transformers knows where its adapters lie
        return has_weight_files(folder) and not self._is_sharded and not adapted

    @property
    def _is_sharded(self) -> bool:
        """Whether this process has only a part of the model."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _has_own_adapters(self, folder: Path) -> bool:
        """Adapters that a strategy put into the model; transformers loads those of PeftModel."""
        return bool(self._strategies) and has_adapter_files(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The strategies' state first: it decides which parameters have optimizer state."""
        if checkpoint is not None and self._strategies:
            assert self.session is not None
            state = self._resuming or load_state(
                Path(checkpoint), self._strategies, mapped=self._has_device
            )
            self._resuming = None
            self.session.load_strategy_state(state)
            del state
        with serialization.patch("load.mmap", self._has_device):  # type: ignore[attr-defined]
            super()._load_optimizer_and_scheduler(checkpoint)

    @property
    def _has_device(self) -> bool:
        """Whether state is copied from the host to a device."""
        return bool(self.args.device.type != "cpu")
