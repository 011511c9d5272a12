"""The comparison of methods on real text, with texts and a model that are small enough."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import run, speeds
from benchmarks.quality.base_model import EVALUATION_TEXT, TRAINING_TEXTS, train_base_model
from benchmarks.quality.methods import BASELINE, METHODS
from benchmarks.record import check_record
from memrt import registry

TINY = (
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=4",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
    "model.config.vocab_size=512",
    "training.max_steps=3",
)


def test_every_method_is_a_stack_of_strategies_and_has_its_own_name() -> None:
    for method in METHODS.values():
        registry.parse_all(method.strategies)
        assert list(method.learning_rates) == sorted(set(method.learning_rates))
        assert METHODS[method.rate_of or BASELINE].rate_of is None  # whose own proxies choose
    assert METHODS[BASELINE].strategies == ()
    assert len({(each.strategies, each.rate_of) for each in METHODS.values()}) == len(METHODS)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The beginnings of the real files."""
    real = os.environ.get("MEMRT_DATA")
    if not real:
        pytest.skip("MEMRT_DATA does not name the folder with the texts")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in (*TRAINING_TEXTS, EVALUATION_TEXT):
        (folder / name).write_text((Path(real) / name).read_text("utf-8")[:20_000], "utf-8")
    lines = (Path(real) / "gsm8k-train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "gsm8k-train.jsonl").write_text("".join(lines[:120]), "utf-8")
    monkeypatch.setenv("MEMRT_DATA", str(folder))
    return folder


@pytest.mark.slow
def test_a_comparison_is_resumed_and_leaves_a_record(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_base_model(tmp_path / "work", data, TINY) == 0
    words = [str(tmp_path / "work"), "--task", "gsm8k", "--proxy-steps", "2", "--steps", "3"]
    words += ["--output", str(tmp_path)]
    assert run.main([*words, "--methods", "adamw"]) == 0
    trained: list[str] = []
    real = run.memrt

    def counted(arguments: list[str]) -> int:
        trained.append(arguments[arguments.index("--output") + 1])
        return real(arguments)

    monkeypatch.setattr(run, "memrt", counted)
    assert run.main([*words, "--methods", "adamw", "lisa"]) == 0
    assert trained
    assert all("lisa" in folder for folder in trained)
    (path,) = tmp_path.glob("quality-*.json")
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    check_record(record)
    adamw, lisa = record["summary"]["rows"]
    assert adamw["above_adamw"] == 0
    assert lisa["above_adamw"] == lisa["evaluation_loss"] - adamw["evaluation_loss"]
    assert lisa["account_maxima"]["optimizer"] < adamw["account_maxima"]["optimizer"]
    assert adamw["learning_rate"] in METHODS["adamw"].learning_rates
    assert record["summary"]["base_evaluation_loss"]["gsm8k"] > 0
    assert not list((tmp_path / "work" / "runs").glob("*/*.safetensors"))

    monkeypatch.setattr(speeds, "STEPS", 1)
    words = [str(tmp_path / "work"), "--task", "gsm8k", "--output", str(tmp_path / "speeds")]
    assert speeds.main([*words, "--methods", "adamw", "lisa"]) == 0
    (path,) = (tmp_path / "speeds").glob("quality_speeds-*.json")
    record = json.loads(path.read_text("utf-8"))
    check_record(record)
    adamw, lisa = record["summary"]["rows"]
    assert adamw["of_adamws"] == 1
    assert lisa["of_adamws"] == lisa["tokens_per_second"] / adamw["tokens_per_second"] > 0
    with pytest.raises(SystemExit):
        speeds.main([*words, "--methods", "lisa"])
