"""Without strategies memrt.Trainer is transformers.Trainer; exact strategies change no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import memrt
from memrt import registry
from memrt.testing import FAMILIES
from tests.trainer_runs import (
    CHECKPOINTING,
    Recorder,
    assert_equal,
    examples,
    history,
    model_of,
    run,
    weights,
)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 5},  # 12 batches an epoch: the last is ragged
    "checkpointing": {"gradient_accumulation_steps": 4, CHECKPOINTING: True},
    "no_clipping": {"max_grad_norm": 0.0},
    "best": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_total_limit": 2,
    },
    "best_is_the_first": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "save_total_limit": 1,
    },
    "save_best": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
    },
    "weights_only": {"save_only_model": True, "save_total_limit": 1},
}
CLOCK = ("runtime", "per_second")


def recorded(folder: Path, *, cls: type, **overrides: Any) -> tuple[Any, list[str]]:
    """A run in `folder`/out, which the arguments name relatively, and its callback events."""
    recorder = Recorder()
    family = overrides.pop("family", "llama")
    options = {"eval_dataset": examples(family)[:4], "callbacks": [recorder]}
    trainer = run(
        Path("out"),
        family=family,
        cls=cls,
        arguments_cls=transformers.TrainingArguments,
        options=options,
        **{"save_strategy": "steps", "save_steps": 2, **overrides},
    )
    return trainer, recorder.events


def files_of(folder: Path) -> dict[str, Any]:
    """Every file's bytes by its path; trainer states are parsed and lose what a clock decides."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        content: Any = path.read_bytes() if path.is_file() else None
        if path.name == "trainer_state.json":
            content = json.loads(content)
            content["log_history"] = [
                {key: value for key, value in entry.items() if not key.endswith(CLOCK)}
                for entry in content["log_history"]
            ]
        found[str(path.relative_to(folder))] = content
    return found


def compare(folder: Path, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> None:
    outcomes = []
    for cls in (transformers.Trainer, memrt.Trainer):
        place = folder / cls.__module__
        place.mkdir()
        monkeypatch.chdir(place)
        trainer, events = recorded(place, cls=cls, **overrides)
        outcomes.append((events, history(trainer), weights(trainer), files_of(place)))
    theirs, ours = outcomes
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
    assert_equal(ours[2], theirs[2])
    assert ours[3].keys() == theirs[3].keys()
    for name in ours[3]:
        assert ours[3][name] == theirs[3][name], name
    assert any("checkpoint-" in name for name in ours[3])


@pytest.mark.parametrize("case", CASES)
def test_without_strategies_the_run_is_that_of_transformers(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(tmp_path, monkeypatch, **CASES[case])


def test_a_model_that_takes_no_loss_arguments_is_the_same_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(tmp_path, monkeypatch, family="plain", gradient_accumulation_steps=5)


def test_resuming_without_strategies_is_that_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recorded(tmp_path, cls=transformers.Trainer)
    ends = []
    for cls in (transformers.Trainer, memrt.Trainer):
        trainer = run(
            tmp_path / cls.__module__,
            cls=cls,
            arguments_cls=transformers.TrainingArguments,
            resume="out/checkpoint-4",
        )
        ends.append((weights(trainer), history(trainer)))
    assert_equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


EXACT = [
    spec
    for spec in ("activation_checkpoint", "offload_activations(min_bytes=0)")
    if registry.parse(spec).exact
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", EXACT)
def test_an_exact_strategy_changes_no_number(spec: str, family: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"family": family, "gradient_accumulation_steps": 2, "max_steps": 4}
    plain = run(tmp_path / "plain", **settings)
    ours = run(tmp_path / "ours", options={"strategies": [spec]}, **settings)
    assert history(ours) == history(plain)
    assert_equal(weights(ours), weights(plain))


def test_both_exact_strategies_together_in_bf16(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", bf16=True, model=model_of("gpt2"))
    ours = run(
        tmp_path / "ours",
        bf16=True,
        model=model_of("gpt2"),
        strategies=["activation_checkpoint", "offload_activations(min_bytes=0)"],
    )
    assert history(ours) == history(plain)
    assert_equal(weights(ours), weights(plain))


def test_dropout_is_on_in_these_tests() -> None:
    """Otherwise equal losses would not show that random numbers are replayed."""
    for family in ("llama", "gpt2", "bert"):
        config = model_of(family).config
        assert any(
            getattr(config, name, 0.0) > 0
            for name in ("attention_dropout", "resid_pdrop", "hidden_dropout_prob")
        )
