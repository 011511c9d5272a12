"""`memrt train` on classifiers: what they learn, what the report says, what loads afterwards."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from tests.cli.conftest import Command
from tests.cli.train_runs import SHORT, assert_equal_weights, weights, write_model

BERT = {
    "model_type": "bert",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
RUN = [
    *("--task", "sequence-classification", "--data", "films.csv", "--model", "bert"),
    *SHORT,
    *("--seq", 48, "--batch", 4),
]
HELD_OUT = ["evaluation_path=held-out.csv"]


def _write_films(path: Path, *, num: int, first: int = 0) -> None:
    """The first word tells the class."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for n in range(first, first + num):
            kind = ("awful", "lovely")[n % 2]
            writer.writerow([f"{kind}, and that {'so ' * (n % 4)}much", ("bad", "good")[n % 2]])


@pytest.fixture(autouse=True)
def files(memrt: Command) -> None:
    """A model and labelled texts in the working folder."""
    Path("bert").mkdir()
    Path("bert/config.json").write_text(json.dumps(BERT))
    write_model(Path("llama"))
    _write_films(Path("films.csv"), num=32)
    _write_films(Path("held-out.csv"), num=9, first=100)


def _run(memrt: Command, *words: object) -> dict[str, Any]:
    result = memrt("train", *words, "--json")
    assert result.code == 0, result.err
    return result.report


def _accuracy(folder: str) -> tuple[float, float]:
    """Accuracy and loss of a finished run on the held-out file, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Path("held-out.csv").open() as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    with torch.no_grad():
        output = model(**batch, labels=labels)
    return float((output.logits.argmax(-1) == labels).float().mean()), float(output.loss)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_classifier_learns_and_is_plain_transformers(memrt: Command, model: str) -> None:
    words = (*RUN, *HELD_OUT, "--model", model, "--steps", 30)
    report = _run(memrt, *words, "--eval-strategy", "steps", "--eval-steps", 15)
    accuracy, loss = _accuracy("memrt-run")
    assert report["evaluation_accuracy"] == pytest.approx(accuracy) == 1
    assert report["evaluation_loss"] == pytest.approx(loss, rel=1e-4)
    assert [each["step"] for each in report["evaluation_accuracies"]] == [15, 30]
    assert report["data"]["label_names"] == ["bad", "good"]
    config = json.loads(Path("memrt-run/config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert config["label2id"] == {"bad": 0, "good": 1}
    assert config["pad_token_id"] is not None
    classify = pipeline("text-classification", model="memrt-run", device="cpu")
    found = classify(["lovely, and that so so much", "awful, and that much"], batch_size=2)
    assert [each["label"] for each in found] == ["good", "bad"]


def test_the_plan_is_of_the_classifier(memrt: Command) -> None:
    report = _run(memrt, *RUN, "--steps", 4, "--batch", 32)  # every batch holds the longest
    assert report["peak_bytes"] == pytest.approx(report["predicted"]["peak_bytes"], abs=4096)
    assert report["accounts"]["weights"] == report["predicted"]["accounts"]["weights"]
    assert report["conditions"]["task"] == "sequence-classification"


def test_console_and_report_tell_the_accuracy(memrt: Command) -> None:
    result = memrt("train", *RUN, *HELD_OUT, "--steps", 2)
    assert result.code == 0, result.err
    assert "classification; 2 labels: bad, good" in result.err
    assert "  accuracy " in result.err
    page = Path("memrt-run/memrt/report.md").read_text()
    assert "- evaluation accuracy: " in page
    assert "| evaluation accuracy" in page
    assert "examples of classification from films.csv" in page


@pytest.mark.parametrize(
    "stack",
    [
        ["lisa(layers=1)", "int8_states"],
        ["galore(rank=4)"],
        ["nf4", "peft(options={'modules_to_save': ['classifier']})"],
        ["activation_checkpoint", "offload_activations"],
    ],
)
def test_stacks_train_a_classifier(memrt: Command, stack: list[str]) -> None:
    report = _run(memrt, *RUN, *HELD_OUT, "--steps", 6, "--batch", 32, "--strategies", *stack)
    assert report["losses"][-1]["loss"] < report["losses"][0]["loss"]
    assert report["peak_bytes"] == pytest.approx(report["predicted"]["peak_bytes"], abs=4096)


def test_a_head_is_put_on_a_trained_encoder_and_goes_on(memrt: Command) -> None:
    _run(memrt, *RUN, "--steps", 4, "--output", "first")
    first = memrt("train", *RUN, "--model", "first", "--steps", 4, "--output", "same")
    assert first.code == 0, first.err
    assert "initialised" not in first.err  # it has a head
    AutoModel.from_pretrained("first").save_pretrained("base")
    AutoTokenizer.from_pretrained("first").save_pretrained("base")
    result = memrt("train", *RUN, "--model", "base", "--steps", 1, "--output", "new")
    assert result.code == 0, result.err
    assert "lacks weights of BertForSequenceClassification" in result.err
    assert "classifier.weight" in result.err
    assert "stays as it was drawn" not in result.err
    stack = "peft(targets=['query'], options={'modules_to_save': []})"
    frozen = memrt("train", *RUN, "--model", "base", "--steps", 1, "--strategies", stack)
    assert frozen.code == 0, frozen.err
    assert "the new head (classifier.weight, classifier.bias) stays as it was drawn" in frozen.err
    assert "modules_to_save': ['classifier']" in frozen.err


def test_adapters_beside_a_new_head_leave_the_head_too(memrt: Command) -> None:
    _run(memrt, *RUN, "--steps", 20, "--output", "first")
    AutoModel.from_pretrained("first").save_pretrained("base")
    AutoTokenizer.from_pretrained("first").save_pretrained("base")
    stack = "peft(options={'modules_to_save': ['classifier']})"
    report = _run(memrt, *RUN, *HELD_OUT, "--model", "base", "--steps", 20, "--strategies", stack)
    accuracy, loss = _accuracy("memrt-run")
    assert report["evaluation_accuracy"] == pytest.approx(accuracy) == 1
    assert report["evaluation_loss"] == pytest.approx(loss, rel=1e-3)


def test_resuming_gives_the_same_bits(memrt: Command) -> None:
    words = (*RUN, *HELD_OUT, "--strategies", "lisa(layers=1, every=3)", "int8_states")
    _run(memrt, *words, "--steps", 6, "--output", "whole")
    _run(memrt, "--resume", "whole/checkpoint-2", "--output", "branch")
    assert_equal_weights(Path("branch"), Path("whole"))


def test_accumulated_micro_batches_train_as_one_batch(memrt: Command) -> None:
    """transformers' Trainer takes the loss of a classifier for a sum over the step."""
    words = (*RUN, "--steps", 2, "model.config=null", "training.max_grad_norm=0", "--optim", "sgd")
    config = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    Path("bert/config.json").write_text(json.dumps(config))
    _run(memrt, *words, "--batch", 8, "--output", "whole")
    report = _run(memrt, *words, "--batch", 4, "--accumulation", 2, "--output", "parts")
    assert report["losses"][0]["loss"] == pytest.approx(0.7, abs=0.15)
    got, wanted = weights(Path("parts")), weights(Path("whole"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


BAD = [
    (["--task", "causal-lm", "--model", "llama", "label_column=label"], "labels are for classifie"),
    (["--data", "sums.txt"], "data.label_column='label': path='sums.txt' is a text without colum"),
    (
        ["evaluation_path=odd.csv"],
        "odd.csv, line 3, column 'label': 'fair' is none of the 2",
    ),
    (["label_column=lable"], "films.csv, line 1: no column 'lable'; .*; did you mean 'label'"),
    (["--strategies", "fused_loss"], "has no language-model head"),
    (["packing=true"], "data.packing=True: records with labels are never packed"),
    (["--task", "poetry"], "model.task='poetry': must be one of causal-lm, sequence-classif"),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_nothing_is_written(
    memrt: Command, words: list[str], expected: str
) -> None:
    Path("odd.csv").write_text("text,label\nso so,bad\nhm,fair\n")
    Path("sums.txt").write_text("one and one\n")
    before = sorted(Path().iterdir())
    result = memrt("train", *RUN, "--steps", 1, *words)
    assert result.code == 1
    assert re.search(expected, result.err), result.err
    assert "Traceback" not in result.err
    assert sorted(Path().iterdir()) == before


def test_a_masked_language_model_says_how_it_can_be_trained(memrt: Command) -> None:
    result = memrt("train", "--model", "bert", "--data", "films.csv")
    assert result.code == 1
    assert "is for masked-lm" in result.error
    assert "model.task=sequence-classification" in result.error


def test_a_trained_head_of_other_classes_is_refused(memrt: Command) -> None:
    _run(memrt, *RUN, "--steps", 1, "--output", "first")
    text = Path("films.csv").read_text().replace("bad", "poor")
    Path("films.csv").write_text(text)
    result = memrt("train", *RUN, "--model", "first", "--steps", 1)
    assert result.code == 1
    assert "the labels are 'good', 'poor', and the model's head knows 'bad', 'good'" in result.error
