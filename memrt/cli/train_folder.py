"""The output folder of `memrt train`: never over another run, and only like settings are resumed.

output/
    config.json, *.safetensors, tokenizer files     the trained model, a plain transformers folder,
                                                     or the adapters or side network beside one
    checkpoint-N/                                    what --resume goes on from
    memrt/config.yaml                                the settings, as a config file
    memrt/data.json                                  size and hash of the data files
    memrt/report.json, report.md, report.html        what the run needed and how it went
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from memrt.checkpoint import check_state, recover, write_json, write_text
from memrt.checkpoint_loading import TRAINER_STATE_NAME, damage, lacking
from memrt.cli.output import require_writable
from memrt.cli.train_config import TrainConfig
from memrt.cli.train_keys import keys
from memrt.cli.train_length import checkpoints_in, require_longer
from memrt.data_arrow import HubTable
from memrt.data_files import is_hub_dataset

__all__ = ["RunFolder", "best_beside", "run_of"]

_CONFIG = Path("memrt") / "config.yaml"
_DATA = Path("memrt") / "data.json"
_MODELS = ("config.json", "adapter_config.json", "ladder.json")
"""Files that say what a folder holds: a model, adapters, a side network."""

_READ = ("model.path", "model.tokenizer", "data.path", "data.evaluation_path")
"""Settings that name what a run reads."""

_FREE = (
    "output",
    "data.path",  # files are compared by what they hold
    "data.evaluation_path",
    "training.logging_",
    "training.log_",
    "training.report_to",
    "training.run_name",
    "training.project",
    "training.trackio_",
    "training.eval_",
    "training.per_device_eval_batch_size",
    "training.bf16_full_eval",
    "training.fp16_full_eval",
    "training.save_",
    "training.load_best_model_at_end",
    "training.metric_for_best_model",
    "training.greater_is_better",
    "training.push_to_hub",
    "training.hub_",
    "training.memory_report",
    "training.stop_on_nonfinite",
    "training.disable_tqdm",
    "training.dataloader_num_workers",
    "training.dataloader_pin_memory",
    "training.dataloader_persistent_workers",
    "training.dataloader_prefetch_factor",
    "training.skip_memory_metrics",
    "training.use_cpu",
    "training.include_num_input_tokens_seen",
    "training.max_steps",  # a longer run; the learning rate then follows the new schedule
    "training.num_train_epochs",
    "strategies",  # compared by memrt.checkpoint, which lets exact ones differ
)
"""Settings that may differ when a run is resumed; each stands for all that begin with it."""


def run_of(path: Path) -> Path:
    """The run's folder of a run or of one of its checkpoints."""
    return path.parent if path.name.startswith("checkpoint-") else path


def best_beside(checkpoint: Path, recorded: Path) -> Path:
    """The best checkpoint of a run: beside its last, for runs are renamed, or as it was recorded.

    A run that branched off may have its best before the branch, in the other folder.
    """
    for found in (checkpoint.parent / recorded.name, recorded):
        if found.is_dir():
            return found
    raise ValueError(
        f"--resume: the run's best model, {str(recorded)!r}, is gone; to take the last step's in "
        "its place set training.load_best_model_at_end=false"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Where a run goes, and where it goes on from."""

    path: Path
    checkpoint: Path | None
    move_aside: bool = False

    # ------------------------------------------------------------ before the run

    @classmethod
    def fresh(cls, path: Path, *, overwrite: bool) -> RunFolder:
        """For a new run; refuses a folder that holds anything else. Leaves nothing."""
        if path.exists() and not path.is_dir():
            raise ValueError(f"output={str(path)!r}: this is a file; name a folder")
        if not path.exists() or not any(path.iterdir()):
            require_writable(path, f"output={str(path)!r}")
            return cls(path=path, checkpoint=None)
        if not (path / _CONFIG).is_file():
            raise ValueError(
                f"output={str(path)!r}: the folder holds files that are no run of `memrt train`; "
                "name another folder"
            )
        holds = _held(path)
        if holds and not overwrite:
            raise ValueError(
                f"output={str(path)!r}: the folder holds a run ({holds}); go on with it by "
                "--resume, name another folder by --output, or rename it to "
                f"{_aside(path).name} and start anew by --overwrite"
            )
        for each in (path, path.absolute().parent) if holds else (path,):
            require_writable(each, f"output={str(path)!r}")
        return cls(path=path, checkpoint=None, move_aside=bool(holds))

    @classmethod
    def resumed(cls, config: TrainConfig, named: Path | None) -> RunFolder:
        """For a run that goes on; refuses one of other settings and a damaged checkpoint."""
        start = config.output if named is None else named
        if not start.is_dir():
            raise ValueError(f"--resume: there is no folder {str(start)!r}; {_instead_of(start)}")
        recover(run_of(start))
        last = str(start) if start != run_of(start) else get_last_checkpoint(str(start))
        if last is None:
            raise ValueError(
                f"--resume: {str(start)!r} holds no checkpoint; leave --resume out to start anew"
            )
        _require_whole(Path(last))
        require_longer(Path(last), config.arguments)
        origin = run_of(Path(last))
        if (origin / _CONFIG).is_file():
            _require_alike(origin, config)
        check_state(Path(last), config.strategies)
        if config.output.resolve() != origin.resolve():
            fresh = cls.fresh(config.output, overwrite=False)
            return cls(path=fresh.path, checkpoint=Path(last))
        require_writable(config.output, f"output={str(config.output)!r}")
        return cls(path=config.output, checkpoint=Path(last))

    @staticmethod
    def settings_of(path: Path) -> TrainConfig | None:
        """The settings that a run was started with."""
        file = run_of(path) / _CONFIG
        return TrainConfig.from_yaml(file) if file.is_file() else None

    def require_outside(self, config: TrainConfig) -> None:
        """Refuse to rename a run that this one reads from."""
        for name in _READ if self.move_aside else ():
            value = config.values[name]
            if value is None or not Path(value).exists():
                continue
            if Path(value).resolve().is_relative_to(self.path.resolve()):
                raise ValueError(
                    f"--overwrite: {name}={value!r} lies in output={str(self.path)!r}, which would "
                    f"be renamed to {_aside(self.path).name}; name another folder by --output"
                )

    # ------------------------------------------------------------ the run

    def open(self, config: TrainConfig) -> str | None:
        """Make the folder and write the settings; returns where an earlier run went."""
        kept = None
        if self.move_aside:
            kept = _aside(self.path)
            os.rename(self.path, kept)
        (self.path / _CONFIG.parent).mkdir(parents=True, exist_ok=True)
        write_text(self.path / _CONFIG, config.to_yaml())
        write_json(self.path / _DATA, _fingerprints(config))
        return None if kept is None else str(kept)

    def last_checkpoint(self) -> str | None:
        """The newest whole checkpoint of this run."""
        return get_last_checkpoint(str(self.path)) if self.path.is_dir() else None

    def publish_model(self, write: Callable[[Path], str]) -> str:
        """`write(folder)` makes a folder, whole or not at all; its files move here, config last."""
        made = self.path / "memrt" / "model"
        if made.exists():  # a run was killed while it moved files
            shutil.rmtree(made)
        what = write(made)
        for file in sorted(made.iterdir(), key=lambda file: file.name in _MODELS):
            target = self.path / file.name
            if target.is_dir():  # a tokenizer's chat templates of before, which no rename replaces
                shutil.rmtree(target)
            os.replace(file, target)
        made.rmdir()
        return what


def _held(path: Path) -> str:
    """What of a run would be lost; nothing where it never came to its first checkpoint."""
    last = get_last_checkpoint(str(path))
    if any((path / name).is_file() for name in _MODELS):
        return "finished"
    return f"up to {Path(last).name}" if last else ""


def _aside(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return kept


# ---------------------------------------------------------------- what may be resumed


def _require_alike(origin: Path, config: TrainConfig) -> None:
    before = TrainConfig.from_yaml(origin / _CONFIG).values
    found = []
    for name, key in keys().items():
        was, now = (values.get(name, key.default) for values in (before, config.values))
        if not name.startswith(_FREE) and was != now:
            found.append(f"{name} was {was!r} and is {now!r}")
    try:
        known = json.loads((origin / _DATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    for name, value in _fingerprints(config).items():
        if known is not None and known.get(name) != value:
            path = config.values[name]
            found.append(f"{name} ({path}) does not hold the data that the run began with")
    if found:
        raise ValueError(
            f"--resume: the run in {str(origin)!r} had other settings: {'; '.join(found)}; resume "
            "with the same, or start a new run with another --output"
        )


def _fingerprints(config: TrainConfig) -> dict[str, Any]:
    return {
        f"data.{argument}": None if path is None else _fingerprint(path, config.data.configuration)
        for argument, path in config.data.paths()
    }


def _fingerprint(path: str, configuration: str | None) -> dict[str, Any]:
    if is_hub_dataset(path):
        return HubTable(name=path, configuration=configuration).fingerprint()
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": Path(path).stat().st_size, "sha256": digest}


def _require_whole(checkpoint: Path) -> None:
    """Refuse a damaged checkpoint before anything is loaded; reads headers only."""
    problem = next(_damage(checkpoint), None)
    if problem is None:
        return
    others = [path for path in checkpoints_in(checkpoint.parent).values() if path != checkpoint]
    remedy = f"resume from another: --resume {others[-1]}" if others else "start the run anew"
    raise ValueError(f"--resume: {problem}; {remedy}")


def _instead_of(start: Path) -> str:
    """What to name where there is no such run or checkpoint."""
    others = [] if start == run_of(start) else list(checkpoints_in(run_of(start)).values())
    return f"name the last one: --resume {others[-1]}" if others else "leave --resume out"


def _damage(checkpoint: Path) -> Iterator[str]:
    if not checkpoint.is_dir():
        yield f"there is no checkpoint {str(checkpoint)!r}"
        return
    weights = sorted(checkpoint.glob("*.safetensors"))
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{path} is damaged ({error})"
    missing = [] if (checkpoint / TRAINER_STATE_NAME).is_file() else [TRAINER_STATE_NAME]
    missing += lacking(checkpoint)
    if missing or not weights:
        yield (
            f"{str(checkpoint)!r} lacks {', '.join(missing) or 'weights'} (was it written with "
            "save_only_model?)"
        )
    yield from damage(checkpoint)
