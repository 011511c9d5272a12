"""The SST-2 example (sst2.yaml) trains on 1,000 real rows; on a tiny encoder of random weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from memrt.cli.main import main

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "sst2.yaml"
TINY = {
    "model_type": "bert",
    "vocab_size": 1500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The beginnings of both files in a folder of their own."""
    folder = os.environ.get("MEMRT_DATA")
    if not folder:
        pytest.skip("MEMRT_DATA is not set: it names the folder with sst2-train.tsv")
    counts = {"sst2-train.tsv": 1000, "sst2-dev.tsv": 200}
    for name, num in counts.items():
        lines = (Path(folder) / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).write_bytes(b"".join(lines[:num]))
    monkeypatch.setenv("MEMRT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return counts


def test_the_example_trains_a_classifier(
    rows: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text(json.dumps(TINY))
    fewer = ["--model", "tiny", "--epochs", "2", "--lr", "3e-3", "training.warmup_steps=0"]
    how = ["--use-cpu", "--logging-steps", "8", "--output", "run", "--json"]
    assert main(["train", str(CONFIG), *fewer, *how]) == 0
    report = json.loads(capsys.readouterr().out)
    data = report["data"]
    found = (data["train"]["num_documents"], data["evaluation"]["num_documents"])
    assert found == tuple(rows.values())
    assert data["label_names"] == ["0", "1"]
    assert report["losses"][-1]["loss"] < report["losses"][0]["loss"]
    assert _accuracy("run") == pytest.approx(report["evaluation_accuracy"])


def _accuracy(folder: str) -> float:
    """Of a finished run on the held-out rows, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.label2id == {"0": 0, "1": 1}
    lines = Path("sst2-dev.tsv").read_text("utf-8").splitlines()
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=96, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float((logits.argmax(-1) == torch.tensor([int(each) for each in labels])).float().mean())
