"""`memrt train --resume`: killed at any moment and gone on with, the weights are the same bits."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from memrt.cli.train_console import ConsoleCallback
from tests.cli.conftest import Command
from tests.cli.train_runs import SHORT, assert_equal_weights, write_model, write_text

ROOT = Path(__file__).resolve().parents[2]
STACK = ["--strategies", "lisa(layers=1, every=3)", "int8_states"]
RUN = ["--data", "sums.txt", "--model", "model", *SHORT, *STACK]


@pytest.fixture(autouse=True)
def files(memrt: Command) -> None:
    """A model with dropout, so that random numbers have to be resumed too, and data."""
    write_model(Path("model"), attention_dropout=0.1)
    write_text(Path("sums.txt"))


def _train(memrt: Command, *words: object) -> None:
    result = memrt("train", *words)
    assert result.code == 0, result.err


def test_a_killed_run_goes_on_to_the_same_bits(memrt: Command) -> None:
    steps = ["--steps", "60", "--save-steps", "2", "--save-total-limit", "2"]
    _train(memrt, *RUN, *steps, "--output", "whole")
    process = subprocess.Popen(
        [sys.executable, "-m", "memrt", "train", *RUN, *steps, "--output", "killed"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not list(Path("killed").glob("checkpoint-*")):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not Path("killed/model.safetensors").exists(), "it had finished"
    result = memrt("train", *RUN, *steps, "--output", "killed", "--resume", "--json")
    assert result.code == 0, result.err
    assert result.report["resumed_from"].startswith("killed/checkpoint-")
    assert result.report["steps"] == 60
    assert_equal_weights(Path("killed"), Path("whole"))


def test_a_run_branches_from_a_checkpoint_without_its_config_file(memrt: Command) -> None:
    _train(memrt, *RUN, "--steps", 6, "--output", "whole")
    _train(memrt, "--resume", "whole/checkpoint-2", "--output", "branch")
    assert_equal_weights(Path("branch"), Path("whole"))


def test_a_finished_run_is_resumed_without_a_step_and_for_more(memrt: Command) -> None:
    _train(memrt, *RUN, "--steps", 2)
    before = Path("memrt-run/model.safetensors").read_bytes()
    Path("memrt-run/model.safetensors").unlink()  # as if it was killed before it was written
    result = memrt("train", "--resume", "--json")
    assert result.code == 0, result.err
    assert "nothing is left to train" in result.err
    assert result.report["steps"] == 2
    assert result.report["peak_bytes"] > 0
    assert Path("memrt-run/model.safetensors").read_bytes() == before
    result = memrt("train", "--resume", "memrt-run", "--steps", 4, "--json")
    assert result.code == 0, result.err
    assert result.report["steps"] == 4
    assert Path("memrt-run/checkpoint-4").is_dir()
    assert Path("memrt-run/model.safetensors").read_bytes() != before


def test_a_run_whose_folder_is_named_from_home_is_one_folder(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path("home").absolute()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    Path("run.yaml").write_text("output: ~/run\nmodel: model\ndata: sums.txt\n")
    _train(memrt, "run.yaml", *SHORT, "--steps", 2)
    assert (home / "run/checkpoint-2").is_dir()
    assert (home / "run/config.json").is_file()
    assert not Path("~").exists()
    _train(memrt, "run.yaml", *SHORT, "--steps", 4, "--resume")
    _train(memrt, "--resume=~/run/checkpoint-2", "--output=~/branch")
    assert_equal_weights(home / "branch", home / "run")


def test_a_finished_run_keeps_its_best_model(memrt: Command) -> None:
    best = ["training.load_best_model_at_end=true", "training.metric_for_best_model=loss"]
    # the highest loss is the best: that of the first evaluation
    best += ["training.greater_is_better=true", "data.evaluation_fraction=0.2"]
    words = [*best, "--eval-strategy", "steps", "--eval-steps", 2, "--steps", 4]
    _train(memrt, *RUN, *words)
    assert_equal_weights(Path("memrt-run"), Path("memrt-run/checkpoint-2"))
    Path("memrt-run").rename("moved")  # its checkpoints know it by its old name
    Path("moved/model.safetensors").unlink()
    _train(memrt, "--resume", "moved")
    assert_equal_weights(Path("moved"), Path("moved/checkpoint-2"))
    shutil.rmtree("moved/checkpoint-2")
    result = memrt("train", "--resume", "moved")
    assert result.code == 1
    assert "best model, 'memrt-run/checkpoint-2', is gone; to take the last" in result.error
    _train(memrt, "--resume", "moved", "training.load_best_model_at_end=false")
    assert_equal_weights(Path("moved"), Path("moved/checkpoint-4"))


DIFFERENT = [
    (["--lr", "1"], "training.learning_rate was 0.005 and is 1"),
    (["--seed", "7"], "seed was 42 and is 7"),
    (["--seq", "16"], "data.sequence_length was 24 and is 16"),
    (["--data", "other.txt"], "data.path (other.txt) does not hold the data that the run began"),
    (["--model", "other"], "model.path was 'model' and is 'other'"),
    (["--strategies", "int8_states"], "was written with strategies ['int8_states', 'lisa']"),
    (["--strategies", "lisa(layers=2)", "int8_states"], "was written with lisa(layers=1"),
]


def test_a_run_of_other_settings_is_refused_and_the_difference_named(memrt: Command) -> None:
    _train(memrt, *RUN, "--steps", 2)
    write_text(Path("other.txt"), num_lines=70)
    write_model(Path("other"))
    before = sorted(Path("memrt-run").rglob("*"))
    for words, expected in DIFFERENT:
        result = memrt("train", *RUN, "--steps", 2, *words, "--resume")
        assert result.code == 1
        assert expected in result.error
        assert "Traceback" not in result.err
    assert sorted(Path("memrt-run").rglob("*")) == before
    # a default that is spelled out is the same setting
    _train(memrt, *RUN, "--steps", 2, "training.weight_decay=0.0", "--resume")


def test_fewer_steps_than_were_trained_are_refused_and_nothing_is_rewritten(
    memrt: Command,
) -> None:
    _train(memrt, *RUN, "--steps", 4)
    kept = Path("memrt-run/memrt/config.yaml").read_bytes()
    refused = [
        (["--steps", 3], "training.max_steps=3: the checkpoint is at step 4; name a larger one"),
        (["--steps", -1, "--epochs", 0.1], "training.num_train_epochs=0.1, "),
    ]
    for words, expected in refused:
        result = memrt("train", "--resume", *words)
        assert result.code == 1
        assert expected in result.error
        assert result.error.endswith(", or --resume memrt-run/checkpoint-2")
        assert "predicted" not in result.err
    result = memrt("train", "--resume", "--steps", 1)
    assert result.error.endswith("the checkpoint is at step 4; name a larger one")
    assert Path("memrt-run/memrt/config.yaml").read_bytes() == kept
    # the end of the run is where the checkpoint is: no step follows a new schedule
    result = memrt("train", "--resume", "memrt-run/checkpoint-2", "--steps", 2, "--output", "half")
    assert result.code == 0, result.err
    assert "nothing is left to train" in result.err
    assert "schedule" not in result.err


def test_a_run_of_epochs_is_finished_where_the_trainer_says(memrt: Command) -> None:
    """As many steps as transformers counts, for a part of an epoch and a last short batch too."""
    write_text(Path("sums.txt"), num_lines=7)
    words = ["--epochs", "0.4", "--accumulation", "2", "--save-strategy", "epoch"]
    _train(memrt, *RUN, *words)
    result = memrt("train", *RUN, *words, "--resume")
    assert result.code == 0, result.err
    assert "nothing is left to train" in result.err


def test_intervals_may_change_and_then_do(memrt: Command) -> None:
    _train(memrt, *RUN, "--steps", 6, "--save-steps", 3)
    words = ["--resume", "memrt-run/checkpoint-3", "--output", "other", "--save-steps", 2]
    result = memrt("train", *words, "--logging-steps", 3, "--json")
    assert result.code == 0, result.err
    assert {path.name for path in Path("other").glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-6",
    }
    assert [each["step"] for each in result.report["losses"]] == [1, 2, 3, 6]
    assert_equal_weights(Path("other"), Path("memrt-run"))


def test_data_that_changed_in_place_is_noticed(memrt: Command) -> None:
    _train(memrt, *RUN, "--steps", 2)
    write_text(Path("sums.txt"), num_lines=61)
    result = memrt("train", *RUN, "--steps", 2, "--resume")
    assert result.code == 1
    assert "data.path (sums.txt) does not hold the data" in result.error


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"],
)
def test_a_damaged_checkpoint_names_the_one_before(memrt: Command, name: str) -> None:
    _train(memrt, *RUN, "--steps", 4)
    path = Path("memrt-run/checkpoint-4") / name
    path.write_bytes(path.read_bytes()[:-100])
    result = memrt("train", "--resume")
    assert result.code == 1
    assert f"{path} is damaged" in result.error
    assert result.error.endswith("--resume memrt-run/checkpoint-2")
    path.unlink()
    result = memrt("train", "--resume")
    lacks = "weights" if name == "model.safetensors" else name
    assert f"'memrt-run/checkpoint-4' lacks {lacks} (was it" in result.error
    assert result.error.endswith("--resume memrt-run/checkpoint-2")
    _train(memrt, "--resume", "memrt-run/checkpoint-2")


def test_a_checkpoint_that_is_not_there_names_the_last_one(memrt: Command) -> None:
    for step in (4, 12):
        Path(f"memrt-run/checkpoint-{step}").mkdir(parents=True)
    result = memrt("train", *RUN, "--resume", "memrt-run/checkpoint-9")
    assert result.code == 1
    assert "there is no folder 'memrt-run/checkpoint-9'; name the last one: " in result.error
    assert result.error.endswith("--resume memrt-run/checkpoint-12")


def test_a_cut_config_of_a_run_is_named(memrt: Command) -> None:
    Path("memrt-run/memrt").mkdir(parents=True)
    Path("memrt-run/memrt/config.yaml").write_text("output: memrt-run\nseed: 42\nmodel:")
    result = memrt("train", "--resume")
    assert result.code == 1
    expected = "config.yaml is damaged (it lacks dtype, strategies, model.path, data.path)"
    assert expected in result.error


def test_there_must_be_something_to_resume(memrt: Command) -> None:
    result = memrt("train", *RUN, "--resume")
    assert result.code == 1
    assert "there is no folder 'memrt-run'; leave --resume out" in result.error
    Path("memrt-run").mkdir()
    result = memrt("train", *RUN, "--resume")
    assert result.code == 1
    assert "holds no checkpoint" in result.error


def test_ctrl_c_names_what_was_saved_since_and_in_which_run(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train(memrt, *RUN, "--steps", 4, "--output", "whole")

    def interrupted(where: str, *words: object) -> tuple[str, list[str]]:
        def interrupt(*_: Any, **told: Any) -> None:
            raise KeyboardInterrupt

        def interrupt_late(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if where == "plan":
                patch.setattr("memrt.cli.train_run.predict", interrupt)
            else:
                patch.setattr(ConsoleCallback, "on_step_begin", interrupt_late, raising=False)
            result = memrt("train", *words)
        assert result.code == 130
        [told] = [line for line in result.err.splitlines() if "go on with: " in line]
        saved, _, again = told.partition("; go on with: memrt ")
        return saved, shlex.split(again)[1:]

    branch = ["--steps", "6", "--output", "branch"]
    begin = "whole/checkpoint-2"
    # before the run's folder is there: the words as they were typed
    assert interrupted("plan", *RUN, *branch, "--resume", begin) == (
        f"saved up to {begin}",
        [*RUN, *branch, "--resume", begin],
    )
    saved, again = interrupted("step", f"--resume={begin}", *branch)
    assert saved == "saved up to branch/checkpoint-4"
    assert again == [*branch, "--resume", "branch/checkpoint-4"]
    result = memrt("train", *again, "--json")
    assert result.code == 0, result.err
    assert result.report["resumed_from"] == "branch/checkpoint-4"


def test_a_run_that_never_came_to_a_checkpoint_is_started_anew(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleCallback, "on_train_begin", interrupt)
        result = memrt("train", *RUN, "--steps", 2)
    assert result.code == 130
    assert "no checkpoint was saved yet" in result.err
    _train(memrt, *RUN, "--steps", 2)
