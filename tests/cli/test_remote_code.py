"""Models that bring Python code: it runs when that is asked for, and not a line of it before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from memrt import load
from memrt.model_source import resolve_config
from tests.cli.conftest import SHAPES, Command
from tests.cli.train_runs import CONFIG, SHORT, write_text

CODE = """\
from pathlib import Path

import transformers

Path("ran").touch()


class OwnConfig(transformers.LlamaConfig):
    model_type = "own_llama"


class OwnModel(transformers.LlamaForCausalLM):
    config_class = OwnConfig


class OwnBody(transformers.LlamaModel):
    config_class = OwnConfig


transformers.AutoModel.register(OwnConfig, OwnBody)  # the classifier asks for it


class OwnForSequenceClassification(transformers.LlamaForSequenceClassification):
    config_class = OwnConfig
"""
MAP = {
    "AutoConfig": "own.OwnConfig",
    "AutoModelForCausalLM": "own.OwnModel",
    "AutoModelForSequenceClassification": "own.OwnForSequenceClassification",
}
REFUSED = "brings its own Python code"


@pytest.fixture(autouse=True)
def own(memrt: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a config, its code and no weights; modules go where the test may write."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own").mkdir()
    Path("own/own.py").write_text(CODE)
    config = {**CONFIG, "model_type": "own_llama", "auto_map": MAP, "architectures": ["OwnModel"]}
    Path("own/config.json").write_text(json.dumps(config))
    write_text(Path("sums.txt"))


TRAIN = ["train", "--model", "own", "--data", "sums.txt", *SHORT, "--steps", "4"]
COMMANDS = [
    TRAIN,
    ["plan", "--model", "own", *SHAPES],
    ["profile", "--model", "own", *SHAPES, "--steps", "4"],
    ["compare", "--model", "own", *SHAPES, "--steps", "4", "--strategies", "none"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_it_is_refused_in_one_line_and_does_not_run(memrt: Command, words: list[str]) -> None:
    result = memrt(*words)
    assert result.code == 1
    assert REFUSED in result.error
    assert result.error.endswith("--trust-remote-code")
    assert "Traceback" not in result.err
    assert not Path("ran").exists()


@pytest.mark.parametrize("words", COMMANDS[1:], ids=lambda words: words[0])
def test_with_trust_it_is_planned_and_measured(memrt: Command, words: list[str]) -> None:
    shapes = ["--seq", "32"]  # the last one wins
    result = memrt(*words, *shapes, "--trust-remote-code", "--json")
    assert result.code == 0, result.err
    assert Path("ran").exists()


def test_with_trust_it_is_trained_and_what_it_leaves_can_be_trained(memrt: Command) -> None:
    result = memrt(*TRAIN, "--trust-remote-code", "--json")
    assert result.code == 0, result.err
    report = result.report
    assert report["peak_bytes"] == pytest.approx(report["predicted"]["peak_bytes"], abs=4096)
    model = AutoModelForCausalLM.from_pretrained("memrt-run", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    again = [*TRAIN, "--model", "memrt-run", "--output", "again"]
    assert REFUSED in memrt(*again).error
    result = memrt(*again, "model.trust_remote_code=true")
    assert result.code == 0, result.err


def test_a_classifier_with_code(memrt: Command) -> None:
    rows = [{"text": f"{n} and {n}", "label": n % 2} for n in range(8)]
    Path("parity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["--task", "sequence-classification", "--data", "parity.jsonl"]
    result = memrt(*TRAIN, *task, "--trust-remote-code")
    assert result.code == 0, result.err
    model = AutoModelForSequenceClassification.from_pretrained("memrt-run", trust_remote_code=True)
    assert type(model).__name__ == "OwnForSequenceClassification"


def test_code_for_a_model_of_a_known_config(memrt: Command) -> None:
    """transformers has the config, and no class for the task."""
    config = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}
    Path("own/config.json").write_text(json.dumps({**config, "architectures": ["OwnModel"]}))
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM; read it, then pass trust_remote"):
        load("own")
    assert not Path("ran").exists()


def test_in_python(memrt: Command) -> None:
    with pytest.raises(ValueError, match=r"its own Python code .*pass trust_remote_code=True"):
        load("own")
    assert not Path("ran").exists()
    assert type(load("own", trust_remote_code=True)).__name__ == "OwnModel"
    trusted = resolve_config("own", trust_remote_code=True)
    assert type(load(trusted)).__name__ == "OwnModel"
