"""`memrt plan`, `profile` and `compare` of classifiers: what they agree on, what they refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import transformers

from tests.cli.conftest import SHAPES, Command
from tests.cli.test_train_classes import BERT

DATA = ["--task", "sequence-classification", "--data", "films.csv", *SHAPES, "--seq", 48]
KEYS = ("peak_bytes", "accounts", "owners", "places", "account_maxima", "phases")


@pytest.fixture(autouse=True)
def files(memrt: Command) -> None:
    """A model without weights and labelled texts in the working folder."""
    Path("bert").mkdir()
    Path("bert/config.json").write_text(json.dumps(BERT))
    with Path("films.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "kind"])
        for n in range(24):
            writer.writerow([f"film number {n} was {'so ' * (n % 4)}long", "abc"[n % 3], n % 2])


@pytest.mark.parametrize(
    "stack",
    [
        ["activation_checkpoint", "int8_states"],
        pytest.param(["none"], marks=pytest.mark.slow),
    ],
    ids="+".join,
)
def test_the_commands_agree_to_the_byte(memrt: Command, stack: list[str]) -> None:
    words = ["--model", "bert", *DATA, "--json"]
    planned = memrt("plan", *words, "--strategies", *stack).report
    profiled = memrt("profile", *words, "--steps", 4, "--strategies", *stack).report
    compared = memrt("compare", *words, "--steps", 4, "--strategies", "+".join(stack)).report
    for key in KEYS:
        assert planned[key] == profiled[key] == profiled["predicted"][key], key
        assert planned[key] == compared["runs"][0][key], key
    assert profiled["conditions"]["task"] == planned["conditions"]["task"] == DATA[1]
    assert profiled["conditions"]["label_names"] == ["a", "b", "c"]
    assert compared["runs"][0]["evaluation_loss"] > 0


def test_the_classes_of_a_new_head_are_those_of_the_data_or_as_many_as_named(
    memrt: Command,
) -> None:
    words = ["plan", "--model", "bert", "--json", *SHAPES]

    def weights(*more: object) -> int:
        found: int = memrt(*words, *more).report["accounts"]["weights"]
        return found

    one = (BERT["hidden_size"] + 1) * 4  # a row of the head and its bias
    assert isinstance(one, int)
    two = weights(*DATA[:2])
    assert weights(*DATA[:2], "--labels", 5) == two + 3 * one
    assert weights(*DATA) == two + one
    assert weights(*DATA, "--label-column", "kind", "--text-pair-column", "label") == two


def test_a_decoder_is_given_padding_and_a_trained_head_is_kept(memrt: Command) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=600,
        num_labels=3,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained("llama")
    words = ["profile", "--model", "llama", *DATA, "--tokenizer", "tokens", "--steps", 4, "--json"]
    from memrt.embedded import embedded_tokenizer

    embedded_tokenizer(600).save_pretrained("tokens")
    found = memrt(*words)
    assert found.code == 0, found.err
    assert found.report["peak_bytes"] == found.report["predicted"]["peak_bytes"]
    assert found.report["conditions"]["weights"] == "loaded"
    fixed = memrt("plan", "--model", "llama", "--labels", 2)
    assert "--labels 2: the head of llama has 3 classes" in fixed.error


REFUSED = [
    (["profile", "--task", "sequence-classification"], "trains on texts with labels: name them"),
    (["compare", "--task", "question-answering"], "bert is for question-answering"),
    (["plan", "--task", "seq2seq-lm"], "--task 'seq2seq-lm': transformers has no such class"),
    (["plan", "--task", "poetry"], "--task 'poetry': must be one of causal-lm"),
    (["plan", "--labels", "3"], "--labels 3: bert is for masked-lm; add --task"),
    (["plan", "--label-column", "x"], "--label-column has no effect without --data"),
    (["plan", *DATA, "--labels", "3"], "the classes are those of --data"),
    (["plan", "--data", "films.csv", "--label-column", "label"], "--label-column label: bert is"),
    (["plan", *DATA, "--label-column", "mood"], "mood"),
    (["profile", *DATA, "--strategies", "fused_loss"], "fused_loss"),
]


@pytest.mark.parametrize(("words", "expected"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_one_line(memrt: Command, words: list[str], expected: str) -> None:
    result = memrt(*words, "--model", "bert", "--seq", 48)
    assert result.code == 1
    assert expected in result.error
    assert "Traceback" not in result.err


def test_a_new_head_is_put_on_weights_without_one(memrt: Command) -> None:
    from memrt.embedded import embedded_tokenizer

    transformers.AutoModel.from_config(transformers.BertConfig(**BERT)).save_pretrained("weights")
    embedded_tokenizer(300).save_pretrained("tokens")
    words = ["--model", "weights", *DATA, "--tokenizer", "tokens", "--json"]
    planned = memrt("plan", *words).report
    with pytest.warns(UserWarning, match=r"lacks weights of BertForSequenceClassification.*class"):
        found = memrt("profile", *words, "--steps", 4)
    assert found.code == 0, found.err
    assert found.report["peak_bytes"] == planned["peak_bytes"]
    assert found.report["conditions"]["weights"] == "loaded"
