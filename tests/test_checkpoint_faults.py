"""Killed while saving, a full disk: whole checkpoints or none, and one clear error."""

from __future__ import annotations

import errno
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from memrt import checkpoint
from memrt.checkpoint import STATE_NAME, staged
from memrt.errors import CheckpointWriteError
from tests.trainer_runs import (
    assert_equal,
    assert_same,
    model_of,
    run,
    saved_state,
    trainer_of,
    weights,
)

SPEC = "lisa(layers=1, every=2, parked='host')"
SAVING = {"save_strategy": "steps", "save_steps": 1}


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


METHODS: dict[str, list[str]] = {
    "galore": ["galore(rank=4, every=2)"],
    "galore in backward": ["galore(rank=4, every=2)", "in_backward(clip='two_pass')"],
    "galore plain": ["galore(rank=4, every=2, form='plain')", "int8_states"],
    "q_galore": ["q_galore(rank=4, every=2)"],
    "apollo": ["apollo(rank=4, every=2)"],
    "apollo_mini": ["apollo_mini(every=2)", "lisa(layers=1, every=2)"],
    "fira": ["fira(rank=4, every=2)"],
    "lomo": ["lomo(clip='two_pass')"],
    "adalomo": ["adalomo(clip='two_pass')"],
    "badam": ["badam(every=2, parked='disk')"],
    "int8": ["int8_states"],
    "fp8": ["fp8_states"],
    "int4": ["int4_states"],
    "adapters": ["nf4", "peft(rank=4)", "int8_states"],
    "side network": ["ladder(reduction=4)"],
}
"""Every kind of state that a checkpoint holds; step 1 of 3 lies in the middle of an interval."""

ALONE = {
    "adapters": {"adapter_model.safetensors", "adapter_config.json", "memrt_base.json"},
    "side network": {"ladder.safetensors", "ladder.json"},
}
"""Files in place of the model's."""


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_any_moment_of_a_save_a_run_goes_on_as_if_never_stopped(
    method: str, tmp_path: Path
) -> None:
    """All moments of three saves leave whole checkpoints; three moments of the second resume."""

    def model() -> nn.Module:
        return model_of("llama", hidden=64, layers=2)

    options: dict[str, Any] = {
        "options": {"strategies": METHODS[method]},
        "max_steps": 3,
        "learning_rate": 1e-2,
        **SAVING,
    }
    trainer = trainer_of(tmp_path / "run", model=model(), save_total_limit=1, **options)
    with photographed(tmp_path / "run", tmp_path / "album"):
        trainer.train()
    complete = names_in(tmp_path / "run/checkpoint-3")
    assert complete >= ALONE.get(method, {"model.safetensors"})
    album = sorted((tmp_path / "album").iterdir())
    assert len(album) > 3 * len(complete)
    for photo in album:
        last = get_last_checkpoint(photo)  # older ones may be half deleted
        assert last is None or names_in(Path(last)) == complete, photo
    moments = [each for each in album if list(each.glob("_memrt-tmp-checkpoint-2/checkpoint-2/*"))]
    for photo in (moments[0], moments[len(moments) // 2], moments[-1]):
        assert get_last_checkpoint(photo) == str(photo / "checkpoint-1")
        again = run(photo, model=model(), resume=True, **options)
        assert_equal(weights(again), weights(trainer))
        assert_same(saved_state(again), saved_state(trainer))
        assert names_in(photo) == {f"checkpoint-{step}" for step in (1, 2, 3)}


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


def test_a_text_that_a_full_disk_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.write_text(tmp_path / "config.yaml", "seed: 1")
    assert caught.value.filename == str(tmp_path / "config.yaml")
    assert names_in(tmp_path) == set()
