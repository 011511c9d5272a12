"""Memory in the Trainer's own log, and through it in every reporter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from memrt.profiling.log_values import is_log_value
from tests.trainer_runs import examples, run

LISA = "lisa(layers=1, every=2)"
RSS = "memory/rss (GiB)"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there are more values on CUDA")


class Lines(transformers.TrainerCallback):  # type: ignore[misc]
    """What a reporter is given."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.found.append(dict(logs))


def lines_of(folder: Path, **options: Any) -> list[dict[str, Any]]:
    lines = Lines()
    more = {"callbacks": [lines], "eval_dataset": examples("llama", count=4)}
    run(folder, options=more, eval_strategy="steps", eval_steps=3, **options)
    return lines.found


@pytest.mark.parametrize(
    "options", [{"memory_report": True}, {"strategies": [LISA]}], ids=["report", "strategies"]
)
def test_every_line_of_training_carries_memory(options: dict[str, Any], tmp_path: Path) -> None:
    lines = lines_of(tmp_path, logging_steps=2, **options)
    training = [line for line in lines if "loss" in line]
    assert len(training) == 3
    for line in training:
        assert {name for name in line if is_log_value(name)} == {RSS}
        assert 0.01 < line[RSS] < 1024
    others = [line for line in lines if "loss" not in line]
    assert len(others) == 3  # two evaluations, and the end
    assert not any(is_log_value(name) for line in others for name in line)


def test_without_strategies_the_log_is_that_of_transformers(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    assert not any(is_log_value(name) for line in lines for name in line)


def test_it_is_read_once_a_line_and_at_no_other_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memrt.profiling.monitor import Monitor

    reads: list[dict[str, float]] = []
    original = Monitor.log_values

    def counted(self: Monitor) -> dict[str, float]:
        reads.append(original(self))
        return reads[-1]

    monkeypatch.setattr(Monitor, "log_values", counted)
    run(tmp_path, memory_report=True, logging_steps=3)
    assert len(reads) == 2


def test_it_is_in_tensorboard_s_event_file(tmp_path: Path) -> None:
    reason = "tensorboard is not installed (pip install tensorboard)"
    pytest.importorskip("tensorboard", reason=reason)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(logs))
        run(tmp_path / "out", memory_report=True, report_to=["tensorboard"])
    (file,) = logs.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    values = [each.value for each in events.Scalars(f"train/{RSS}")]
    assert [each.step for each in events.Scalars(f"train/{RSS}")] == [1, 2, 3, 4, 5, 6]
    assert all(0.01 < value < 1024 for value in values)


WANDB_RUN = """
import sys
from pathlib import Path
from tests.trainer_runs import run

run(Path(sys.argv[1]), memory_report=True, report_to=["wandb"], run_name="offline")
"""


def test_it_is_in_the_file_that_wandb_keeps_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install wandb)")
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    done = subprocess.run(  # apart: wandb starts a process of its own and hooks into this one
        [sys.executable, "-c", WANDB_RUN, str(tmp_path / "out")],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.read_bytes().count(f"train/{RSS}".encode()) >= 6  # in the record of every step
