"""The GSM8K example trains on the real file; a handful of steps of a shallower model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from memrt.cli.main import main
from memrt.data import DataSettings, load_examples

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "gsm8k" / "train.yaml"


@pytest.fixture
def data_folder() -> Path:
    """The folder with the data, which is not a part of this project."""
    folder = os.environ.get("MEMRT_DATA")
    if not folder:
        pytest.skip("MEMRT_DATA is not set: it names the folder with gsm8k-train.jsonl")
    return Path(folder)


def test_without_the_variable_the_error_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMRT_DATA", raising=False)
    assert main(["train", str(CONFIG), "--print-config"]) == 1
    assert "data.path: \"Environment variable 'MEMRT_DATA' not found\"" in capsys.readouterr().err


def test_the_example_learns_answers_and_not_questions(
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    fewer = [
        "model.config.num_hidden_layers=1",
        "evaluation_fraction=0.001",
        "training.warmup_steps=1",
        "eval_steps=3",
        "save_steps=6",
        "logging_steps=1",
        "--use-cpu",
    ]
    words = [str(CONFIG), *fewer, "--steps", "6", "--batch", "2", "--output", "run", "--json"]
    assert main(["train", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["losses"][-1]["loss"] < report["losses"][0]["loss"] - 0.3
    first, last = report["evaluation_losses"]
    assert last["loss"] < first["loss"]
    assert AutoModelForCausalLM.from_pretrained("run").config.vocab_size == 4096
    part = report["data"]["train"]
    assert part["num_examples"] + report["data"]["evaluation"]["num_examples"] == 7473
    assert 0.3 < part["num_masked_tokens"] / part["num_tokens"] < 0.5

    tokenizer = AutoTokenizer.from_pretrained("run")
    with (data_folder / "gsm8k-train.jsonl").open(encoding="utf-8") as file:
        row = json.loads(file.readline())
    Path("one.jsonl").write_text(json.dumps(row) + "\n")
    settings = DataSettings(
        path="one.jsonl",
        sequence_length=512,
        prompt_column="question",
        completion_column="answer",
        separator="\n",
    )
    labels = load_examples(settings, tokenizer).train[0]["labels"]
    trained = tokenizer.decode([label for label in labels if label != -100])
    assert trained == row["answer"] + tokenizer.eos_token
