"""Checkpoints: exact to resume from, refused when they do not fit, pushed under their name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import memrt
from memrt import checkpoint, registry
from memrt.checkpoint import SETTINGS_NAME, STATE_NAME
from memrt.strategy import Attachment
from memrt.testing import tiny_batches
from tests.contract import SPECS, specs
from tests.trainer_runs import (
    assert_equal,
    assert_same,
    history,
    model_of,
    run,
    saved_state,
    trainer_of,
    weights,
)

SPEC = "lisa(layers=1, every=2, parked='host')"
SAVING = {"save_strategy": "steps", "save_steps": 1}


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
    resume_exactly(tmp_path, specs([name]), "llama", gradient_accumulation_steps=2)


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


@pytest.mark.parametrize("strategies", [[], [SPEC]], ids=str)
def test_a_checkpoint_that_is_not_there_is_named(strategies: list[str], tmp_path: Path) -> None:
    named = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=f"resume_from_checkpoint='{named}': there is no such"):
        run(tmp_path, options={"strategies": strategies}, resume=named)


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


@pytest.mark.parametrize(
    ("name", "damage", "strategies", "match"),
    [
        ("trainer_state.json", "cut", [], "trainer_state.json is damaged"),
        ("trainer_state.json", "newer", [SPEC], "is damaged, or of another transformers.*'news'"),
        ("trainer_state.json", "gone", [], "trainer_state.json is missing"),
        ("optimizer.pt", "half", [], "optimizer.pt is damaged"),
        ("rng_state.pth", "empty", [], "rng_state.pth is damaged"),
        ("optimizer.pt", "gone", [SPEC], "lacks optimizer.pt"),
        ("scheduler.pt", "gone", [SPEC], "lacks scheduler.pt"),
        ("rng_state.pth", "gone", [SPEC], "lacks rng_state.pth"),
    ],
)
def test_what_transformers_reads_is_refused_in_one_sentence_too(
    name: str, damage: str, strategies: list[str], match: str, tmp_path: Path
) -> None:
    run(tmp_path, options={"strategies": strategies}, max_steps=2, **SAVING)
    path = tmp_path / "checkpoint-2" / name
    if damage == "newer":
        path.write_text(json.dumps({**json.loads(path.read_text()), "news": 1}))
    else:
        DAMAGE[damage](path)
    refused(tmp_path, strategies, f"checkpoint-2.*{match}.*; resume from another checkpoint$")


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
