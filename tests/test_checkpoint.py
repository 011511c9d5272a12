"""Checkpoints: whole or not there, exact to resume from, refused when they do not fit."""

from __future__ import annotations

import copy
import errno
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

import memrt
from memrt import checkpoint, registry
from memrt.checkpoint import SETTINGS_NAME, STATE_NAME, staged
from memrt.errors import CheckpointWriteError
from memrt.strategy import Attachment
from memrt.testing import tiny_batches
from tests.contract import SPECS
from tests.trainer_runs import assert_equal, history, model_of, run, trainer_of, weights

SPEC = "lisa(layers=1, every=2, parked='host')"
SAVING = {"save_strategy": "steps", "save_steps": 1}


# -------------------------------------------------------------------- exact resume


def saved_state(trainer: Any) -> dict[str, Any]:
    """Optimizer and strategies, as a checkpoint would hold them."""
    return {
        "optimizer": trainer.optimizer.state_dict()["state"],
        "strategies": trainer.session.strategy_state(),
    }


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours, theirs)
    else:
        assert one == other


def resume_exactly(folder: Path, specs: list[str], family: str, **overrides: Any) -> None:
    """Stopped at step 3 of 5, in the middle of an interval (2 in these specs, 3 for GaLore)."""
    options = {
        "family": family,
        "options": {"strategies": specs},
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 3,
        **overrides,
    }
    whole = run(folder, **options)
    again = run(folder / "again", resume=str(folder / "checkpoint-3"), **options)
    assert history(again)[:-1] == history(whole)[:-1]  # the last is the mean over all steps
    assert_equal(weights(again), weights(whole))
    assert_same(saved_state(again), saved_state(whole))


@pytest.mark.parametrize("name", registry.names())
def test_every_strategy_resumes_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    resume_exactly(tmp_path, [SPECS[name]], "llama", gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    "names",
    [["galore", "lisa", "int8_states"], ["activation_checkpoint", "offload_activations", "lisa"]],
    ids="+".join,
)
def test_stacks_resume_as_if_never_stopped(names: list[str], tmp_path: Path) -> None:
    resume_exactly(tmp_path, [SPECS[name] for name in names], "gpt2")


def test_galore_resumes_in_the_middle_of_an_interval(tmp_path: Path) -> None:
    resume_exactly(tmp_path, ["galore(rank=4, every=2)"], "llama")


def test_parked_state_resumes_in_bf16(tmp_path: Path) -> None:
    resume_exactly(tmp_path, [SPEC], "plain", bf16=True)


def test_one_trainer_can_go_back_to_an_earlier_checkpoint(tmp_path: Path) -> None:
    """What it parked after that checkpoint must not come back."""
    trainer = run(tmp_path, options={"strategies": [SPEC]}, **SAVING)
    ends = weights(trainer), saved_state(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(weights(trainer), ends[0])
    assert_same(saved_state(trainer), ends[1])


@pytest.mark.parametrize("optimizer_first", [False, True])
def test_going_back_brings_nothing_of_the_present_along(optimizer_first: bool) -> None:
    """Both orders of loading: neither parked nor active state of later steps may remain."""
    model = model_of("plain")
    session = memrt.prepare(model, [SPEC], lr=1e-2)
    assert session.optimizer is not None

    def advance(steps: int) -> None:
        for batch in tiny_batches("plain", count=steps):
            session.train_micro_batch(lambda batch=batch: model(**batch)["loss"])  # type: ignore[misc]
            session.step()

    advance(1)
    before = copy.deepcopy(session.state_dict())
    advance(6)
    drawn = before["strategies"]["lisa"]["active"]
    assert session.state_dict()["strategies"]["lisa"]["active"] != drawn
    assert any(f"layers.{drawn[0]}." in name for name in session.state_dict()["parked"])
    if optimizer_first:
        session.optimizer.load_state_dict(before["optimizer"])
        session.load_strategy_state(before)
    else:
        session.load_state_dict(before)
    assert_same(session.state_dict(), before)


def test_what_is_written_is_read_by_the_safe_loader_and_small(tmp_path: Path) -> None:
    run(tmp_path, options={"strategies": [SPEC, "activation_checkpoint"]}, **SAVING)
    folder = tmp_path / "checkpoint-6"
    settings = json.loads((folder / SETTINGS_NAME).read_text())
    assert settings["step"] == 6
    assert settings["memrt"] == memrt.__version__
    assert [each["name"] for each in settings["strategies"]] == ["lisa", "activation_checkpoint"]
    state = torch.load(folder / STATE_NAME, weights_only=True)
    assert state["parked"]  # one of four layers was left and waits
    assert [str(each) for each in checkpoint.read_strategies(folder)] == [
        "lisa(layers=1, every=2, parked='host')",
        "activation_checkpoint",
    ]


def test_save_only_model_writes_no_state(tmp_path: Path) -> None:
    run(tmp_path, options={"strategies": [SPEC]}, save_only_model=True, **SAVING)
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert not names & {STATE_NAME, SETTINGS_NAME, "optimizer.pt"}
    assert "model.safetensors" in names


# -------------------------------------------------------------------- checkpoints that do not fit


def refused(folder: Path, strategies: list[str], match: str) -> None:
    """Resuming raises, and model, optimizer and step are what they were."""
    options = {"strategies": strategies} if strategies else {}
    trainer = trainer_of(folder / "other", options=options)
    before = weights(trainer)
    with pytest.raises(ValueError, match=match):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_equal(weights(trainer), before)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert trainer.optimizer is None


@pytest.mark.parametrize(
    ("written", "here", "match"),
    [
        ([SPEC], [], r"written with strategies \['lisa'\], this run has none"),
        ([], [SPEC], r"written with strategies none, this run has \['lisa'\]"),
        (
            [SPEC],
            ["activation_checkpoint"],
            r"\['lisa'\], this run has \['activation_checkpoint'\]",
        ),
        (["lisa(layers=1, every=2)"], ["lisa(layers=1, every=3)"], r"every=2.*every=3"),
    ],
)
def test_another_stack_is_refused_before_anything_changes(
    written: list[str], here: list[str], match: str, tmp_path: Path
) -> None:
    run(tmp_path, options={"strategies": written}, max_steps=2, **SAVING)
    refused(tmp_path, here, match)


def test_settings_of_an_exact_strategy_may_change(tmp_path: Path) -> None:
    one, other = "offload_activations", "offload_activations(min_bytes=0)"
    whole = run(tmp_path, options={"strategies": [one]}, **SAVING)
    resumed = run(
        tmp_path / "again",
        options={"strategies": [other]},
        resume=str(tmp_path / "checkpoint-3"),
    )
    assert_equal(weights(resumed), weights(whole))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state_is_refused_before_anything_changes(damage: str, tmp_path: Path) -> None:
    run(tmp_path, options={"strategies": [SPEC]}, max_steps=2, **SAVING)
    DAMAGE[damage](tmp_path / "checkpoint-2" / STATE_NAME)
    refused(tmp_path, [SPEC], f"{STATE_NAME} is (damaged|missing)")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}'])
def test_damaged_settings_are_refused(text: str, tmp_path: Path) -> None:
    run(tmp_path, options={"strategies": [SPEC]}, max_steps=2, **SAVING)
    (tmp_path / "checkpoint-2" / SETTINGS_NAME).write_text(text)
    refused(tmp_path, [SPEC], f"{SETTINGS_NAME} is damaged")


def test_another_version_is_refused_and_named(tmp_path: Path) -> None:
    run(tmp_path, options={"strategies": [SPEC]}, max_steps=2, **SAVING)
    path = tmp_path / "checkpoint-2" / SETTINGS_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99, "memrt": "7.1"}))
    refused(tmp_path, [SPEC], "version 99.*memrt 7.1")


def test_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    run(tmp_path, options={"strategies": [SPEC]}, max_steps=2, **SAVING)
    torch.save({"x": Attachment}, tmp_path / "checkpoint-2" / STATE_NAME)
    refused(tmp_path, [SPEC], f"{STATE_NAME} is damaged")


# -------------------------------------------------------------------- killed while saving


@contextmanager
def photographed(folder: Path, album: Path) -> Iterator[None]:
    """Copy `folder` at every system call of Python's that is about to change something in it.

    Each copy is what a process that is killed at that moment leaves behind.
    """
    changing = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
    busy = [False]
    seen: set[tuple[str, ...]] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if busy[0] or event not in changing or str(folder) not in str(arguments[0]):
            return
        busy[0] = True
        state = tuple(
            f"{path.relative_to(folder)} {path.stat().st_size if path.is_file() else ''}"
            for path in sorted(folder.rglob("*"))
        )
        if state not in seen:
            seen.add(state)
            shutil.copytree(folder, album / f"{len(seen):03d}")
        busy[0] = False

    active = [True]
    sys.addaudithook(lambda event, arguments: hook(event, arguments) if active[0] else None)
    try:
        yield
    finally:
        active[0] = False


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("strategies", [[], [SPEC]], ids=["plain", "lisa"])
def test_killed_at_any_moment_of_a_save_leaves_whole_checkpoints(
    strategies: list[str], tmp_path: Path
) -> None:
    trainer = trainer_of(
        tmp_path / "run",
        options={"strategies": strategies},
        save_total_limit=2,
        **SAVING,
    )
    with photographed(tmp_path / "run", tmp_path / "album"):
        trainer.train()
    complete = names_in(tmp_path / "run" / "checkpoint-6")
    album = sorted((tmp_path / "album").iterdir())
    assert len(album) > 6 * 8  # six saves of eight files and more
    assert any(list(photo.glob("_memrt-tmp-checkpoint-*/*/optimizer.pt")) for photo in album)
    newest = 0
    for photo in album:
        last = get_last_checkpoint(photo)
        step = 0 if last is None else int(Path(last).name.removeprefix("checkpoint-"))
        assert step in (newest, newest + 1)
        newest = step
        if last is not None:
            assert names_in(Path(last)) == complete
    assert newest == 6


def test_what_a_killed_save_left_can_be_resumed_from_and_is_cleared(tmp_path: Path) -> None:
    options: dict[str, Any] = {"options": {"strategies": [SPEC]}, **SAVING}
    trainer = trainer_of(tmp_path / "run", **options)
    with photographed(tmp_path / "run", tmp_path / "album"):
        trainer.train()
    album = sorted((tmp_path / "album").iterdir())
    photo = next(
        each for each in album if list(each.glob("_memrt-tmp-checkpoint-4/*/trainer_state.json"))
    )
    again = run(photo, resume=True, **options)
    assert_equal(weights(again), weights(trainer))
    assert names_in(photo) == {f"checkpoint-{step}" for step in range(1, 7)}


def test_what_another_process_left_is_cleared_by_the_next_save(tmp_path: Path) -> None:
    class Litter(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                (tmp_path / "_memrt-tmp-checkpoint-9" / "checkpoint-9").mkdir(parents=True)

    run(tmp_path, options={"callbacks": [Litter()]}, max_steps=3, **SAVING)
    assert names_in(tmp_path) == {f"checkpoint-{step}" for step in (1, 2, 3)}


def test_a_checkpoint_on_demand_is_exact_too(tmp_path: Path) -> None:
    """transformers' just-in-time checkpoint: its own callback saves before the step has ended."""

    class Demand(transformers.TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:  # the third step is being applied
                manager.is_checkpoint_requested = True

    options: dict[str, Any] = {"strategies": [SPEC]}
    whole = run(tmp_path / "whole", options=options)
    trainer = trainer_of(
        tmp_path / "run",
        options={**options, "callbacks": [Demand()]},
        enable_jit_checkpoint=True,
    )
    callbacks = trainer.callback_handler.callbacks
    manager = next(c.jit_manager for c in callbacks if hasattr(c, "jit_manager"))
    trainer.train()
    assert trainer.state.global_step == 3
    assert names_in(tmp_path / "run") == {"checkpoint-3"}
    assert "checkpoint-is-incomplete.txt" not in names_in(tmp_path / "run/checkpoint-3")
    resumed = run(tmp_path / "run", resume=True, options=options)
    assert_equal(weights(resumed), weights(whole))
    assert_same(saved_state(resumed), saved_state(whole))


def test_saving_over_a_checkpoint_never_loses_it(tmp_path: Path) -> None:
    """Started anew in the same folder: the old checkpoint lives until the new one is whole."""
    options: dict[str, Any] = {"options": {"strategies": [SPEC]}, "max_steps": 1, **SAVING}
    run(tmp_path / "run", **options)
    first = (tmp_path / "run/checkpoint-1/model.safetensors").read_bytes()
    trainer = trainer_of(tmp_path / "run", learning_rate=0.1, **options)
    with photographed(tmp_path / "run", tmp_path / "album"):
        trainer.train()
    second = (tmp_path / "run/checkpoint-1/model.safetensors").read_bytes()
    assert first != second
    moved = 0
    for photo in sorted((tmp_path / "album").iterdir()):
        moved += not (photo / "checkpoint-1").exists()
        checkpoint.recover(photo)
        assert names_in(photo) == {"checkpoint-1"}
        assert (photo / "checkpoint-1/model.safetensors").read_bytes() in (first, second)
        assert names_in(photo / "checkpoint-1") == names_in(tmp_path / "run/checkpoint-1")
    assert moved  # the moment between the two renames was seen


def test_recover_touches_nothing_else(tmp_path: Path) -> None:
    for name in ("checkpoint-3", "tmp-checkpoint-4", "_memrt-tmp-other", "_memrt-old-other"):
        (tmp_path / name).mkdir()
    checkpoint.recover(tmp_path)
    assert len(names_in(tmp_path)) == 4


# -------------------------------------------------------------------- the disk is full


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


MODEL_WRITER = "transformers.modeling_utils.PreTrainedModel.save_pretrained"


@pytest.mark.parametrize(
    ("writer", "strategies"),
    [
        (MODEL_WRITER, []),
        ("torch.save", []),
        ("memrt.checkpoint.save_state", [SPEC]),
        ("os.fsync", [SPEC]),
    ],
)
def test_a_full_disk_is_one_clear_error_and_costs_no_checkpoint(
    writer: str, strategies: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"options": {"strategies": strategies}, "max_steps": 4, **SAVING}
    whole = weights(run(tmp_path, **options))
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    trainer = trainer_of(tmp_path, **options)
    monkeypatch.setattr(writer, full)
    with pytest.raises(CheckpointWriteError, match=r"checkpoint-3 could not.*No space left.*GiB"):
        trainer.train(resume_from_checkpoint=True)
    monkeypatch.undo()
    assert names_in(tmp_path) == {"checkpoint-1", "checkpoint-2"}
    assert_equal(weights(run(tmp_path, resume=True, **options)), whole)


@pytest.mark.parametrize("limit", [100_000, 200_000])
def test_files_that_may_not_grow_are_one_clear_error(limit: int, tmp_path: Path) -> None:
    """A true failure of the operating system: of safetensors' writer, and of torch's."""
    trainer = trainer_of(tmp_path, save_steps=2, save_strategy="steps")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointWriteError, match="checkpoint-2 could not be written"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == set()


def test_an_error_that_is_not_the_disk_s_is_passed_on(tmp_path: Path) -> None:
    def fails() -> None:
        with staged(tmp_path / "final") as folder:
            (folder / "half").touch()
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fails()
    assert names_in(tmp_path) == set()


def test_state_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(tmp_path, options={"strategies": [SPEC]}, max_steps=2)
    checkpoint.save_state(tmp_path, trainer.session)
    before = (tmp_path / STATE_NAME).read_bytes()

    def half(_: Any, path: Path) -> None:
        path.write_bytes(before[:100])
        full()

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_state(tmp_path, trainer.session)
    assert (tmp_path / STATE_NAME).read_bytes() == before


# -------------------------------------------------------------------- hub


def test_a_checkpoint_is_pushed_once_under_its_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "transformers.Trainer._push_from_checkpoint",
        lambda self, folder: pushed.append((folder, Path(folder, "trainer_state.json").is_file())),
    )
    trainer = trainer_of(tmp_path, max_steps=2, **SAVING)
    trainer.args.push_to_hub = True
    monkeypatch.setattr("transformers.Trainer._finish_current_push", lambda self: None)
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), True) for step in (1, 2)]
