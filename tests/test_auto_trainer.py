"""`memory_budget`: a Trainer, and `memrt train`, choose the strategies that their data needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import memrt
from memrt import TrainingArguments
from memrt.auto import Choice
from memrt.auto_trainer import _stack_of, choice_for_trainer
from memrt.cli.main import main
from memrt.errors import ConflictError
from memrt.planning import Plan
from tests.cli.train_runs import SHORT, write_model, write_text
from tests.trainer_runs import CHECKPOINTING, examples, model_of, trainer_of


def _needed(trainer: Any) -> Plan:
    """The plan of the run as it is."""
    return choice_for_trainer(trainer, [], "24GiB").plan


def test_a_trainer_chooses_for_its_longest_examples_and_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probe = trainer_of(tmp_path / "probe")
    state = torch.get_rng_state()
    needed = _needed(probe)
    assert torch.equal(torch.get_rng_state(), state)
    probe.train_dataset = [*examples("llama", count=4), *examples("llama", count=2, length=16)]
    longer = _needed(probe)
    # twice the tokens: activations grow with them, attention scores with their square
    before = needed.simulation.account_maxima["activations"]
    assert 2 * before <= longer.simulation.account_maxima["activations"] <= 4 * before
    budget = str(needed.device_bytes["high"] - 1)
    with caplog.at_level(logging.WARNING, logger="memrt"):
        trainer = trainer_of(tmp_path / "run", memory_budget=budget, max_steps=2)
    assert trainer.memory_choice.fits
    names = [strategy.name for strategy in trainer.session.strategies]
    assert names == [spec.split("(")[0] for spec in trainer.memory_choice.strategies] != []
    assert trainer.memory_choice.plan.device_bytes["high"] <= int(budget)
    assert f"memory_budget={budget}" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_trainer_that_cannot_fit_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"memory_budget='1KiB': no stack .*\n(.*\n)*.*larger card"
    ):
        trainer_of(tmp_path, memory_budget="1KiB")
    with pytest.raises(ValueError, match="needs a transformers model, not "):
        trainer_of(tmp_path, family="plain", memory_budget="1GiB")
    with pytest.raises(ValueError, match="memory_budget='much' is neither"):
        TrainingArguments(output_dir=str(tmp_path), memory_budget="much")
    with pytest.raises(ValueError, match=r"^memory_budget=24: must be text, such as '24GiB'"):
        TrainingArguments(output_dir=str(tmp_path), memory_budget=24)
    assert trainer_of(tmp_path).memory_choice is None


def test_budget_and_report_are_keywords_of_the_trainer_too(tmp_path: Path) -> None:
    """Plain arguments of transformers have neither; where both can say it, they say the same."""
    plain: dict[str, Any] = {"arguments_cls": transformers.TrainingArguments}
    keywords = {"memory_budget": "24GiB", "memory_report": True}
    for place in ({"options": keywords, **plain}, keywords, {"options": keywords, **keywords}):
        trainer = trainer_of(tmp_path, **place)
        assert trainer.memory_choice.plan.gpu.text == "24GiB"
        assert trainer._report is not None
    assert trainer_of(tmp_path, **plain).memory_choice is None
    off = trainer_of(tmp_path, options={"memory_report": False})
    assert off._report is None
    for name, keyword, other in (
        ("memory_budget", "24GiB", "80GiB"),
        ("memory_report", False, True),
    ):
        with pytest.raises(ValueError, match=rf"{name}={keyword!r} was given .*{other!r} in its"):
            trainer_of(tmp_path, options={name: keyword}, **{name: other})
    with pytest.raises(ValueError, match="memory_budget='much' is neither"):
        trainer_of(tmp_path, options={"memory_budget": "much"}, **plain)
    with pytest.raises(ValueError, match=r"memory_report='no': must be True or False"):
        trainer_of(tmp_path, options={"memory_report": "no"}, **plain)


def test_nothing_is_chosen_that_the_trainer_itself_refuses(tmp_path: Path) -> None:
    """transformers' own checkpointing is in no plan, and owns the recompute."""
    own = {CHECKPOINTING: True}
    needed = _needed(trainer_of(tmp_path)).device_bytes["high"]
    choice = trainer_of(tmp_path, memory_budget=str(needed - 1), **own).memory_choice
    assert choice.fits
    assert not any("activation_checkpoint" in spec for spec in choice.strategies)
    with pytest.raises(ConflictError, match=r"gradient_checkpointing=True and activation_check"):
        trainer_of(tmp_path, memory_budget="1GiB", strategies=["activation_checkpoint"], **own)
    named = ["galore(rank=4, targets=('q+proj', 'up_proj'))", "int8_states"]
    assert [str(each) for each in _stack_of("+".join(named))] == named


def test_memrt_train_chooses_nothing_that_its_settings_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--model", write_model(Path("model"), vocab_size=4096)]
    words += ["--data", write_text(Path("sums.txt")), *SHORT, "--batch", "8", "--steps", "1"]
    assert main([*words, "--output", "free", "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["predicted"]["device_bytes"]["high"]
    budget = f"memory_budget={needed - 1}"
    for setting, refused in (
        (f"training.{CHECKPOINTING}=true", "activation_checkpoint"),
        ("training.label_smoothing_factor=0.1", "fused_loss"),
    ):
        assert main([*words, budget, setting, "--output", refused]) == 0, capsys.readouterr().err
        kept = yaml.safe_load((Path(refused) / "memrt/config.yaml").read_text())["strategies"]
        assert kept
        assert refused not in kept


def test_a_model_that_its_config_does_not_describe_is_refused(tmp_path: Path) -> None:
    """What is frozen would be planned as trained, and adapters not at all."""
    frozen = model_of("llama")
    frozen.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' does not train; choose"):
        trainer_of(tmp_path, model=frozen, memory_budget="24GiB")
    grown = model_of("llama")
    grown.added = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'added.bias' is added; choose with memrt.choose"):
        trainer_of(tmp_path, model=grown, memory_budget="24GiB")


def test_a_run_within_a_budget_is_resumed_with_its_own_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody named the strategies of the checkpoint, and they are not chosen a second time."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "--model", write_model(Path("model")), "--data", write_text(Path("sums.txt"))]
    words += [*SHORT, "--steps", "4"]
    chosen: list[Sequence[str]] = []

    def choose(model: Any, named: Any, *, budget: str, **options: Any) -> Choice:
        chosen.append([str(each) for each in named])
        found = memrt.plan(
            model,
            ["lisa(layers=1)"],
            gpu=budget,
            **{n: v for n, v in options.items() if n not in ("on_plan", "settings")},
        )
        return Choice(
            strategies=("lisa(layers=1)",),
            plan=found,
            fits=True,
            rung="",
            reasons=(),
            candidates=(),
        )

    monkeypatch.setattr("memrt.auto.choose", choose)
    assert main([*words, "memory_budget=24GiB"]) == 0
    assert len(chosen) == 1
    for named in ([], ["--strategies", "lisa(layers=1)"]):
        assert main([*words, *named, "memory_budget=24GiB", "--resume"]) == 0, capsys.readouterr()
        assert "nothing is left to train" in capsys.readouterr().err
    assert main([*words, "memory_budget=24GiB", "--resume", "memrt-run/checkpoint-2"]) == 0
    assert len(chosen) == 1
    kept = yaml.safe_load(next(Path("memrt-run").rglob("*.yaml")).read_text())
    assert kept["strategies"] == ["lisa(layers=1)"]
    capsys.readouterr()
    assert main([*words, "memory_budget=23GiB", "--resume"]) == 1
    assert "memory_budget was '24GiB' and is '23GiB'" in capsys.readouterr().err
    named = ["--strategies", "int8_states", "memory_budget=24GiB", "--resume"]
    assert main([*words, *named]) == 1
    assert "was written with" in capsys.readouterr().err


def test_memrt_train_chooses_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--model", write_model(Path("model")), "--data", write_text(Path("sums.txt"))]
    words += [*SHORT, "--steps", "2", "--strategies", "lisa(layers=1)"]
    assert main([*words, "memory_budget=24GiB"]) == 0
    said = capsys.readouterr().err
    assert "planning lisa(layers=1)" in said
    assert "lisa(layers=1): you named it" in said
    kept = yaml.safe_load(next(Path("memrt-run").rglob("*.yaml")).read_text())
    assert kept["strategies"] == ["lisa(layers=1)"]
    assert kept["memory_budget"] == "24GiB"
    assert main([*words, "memory_budget=1KiB", "output=other"]) == 1
    assert "no stack of strategies fits" in capsys.readouterr().err
    assert not Path("other").exists()
    assert main([*words, "training.memory_budget=24GiB"]) == 1
    assert "set memory_budget, beside training" in capsys.readouterr().err
