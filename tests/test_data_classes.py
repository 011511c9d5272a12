"""Labelled texts: ids, labels and batches are those that transformers' own tools give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from memrt.data import Collator, DataSettings, Labels, load_examples, read_label_names

TEXT = "good bad film very long and short so it was a plot with none of that in the end"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] text [SEP] second [SEP], with types."""
    inner = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    inner.train_from_iterator([" ".join(WORDS)], trainer)
    inner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def films(num: int, **other: Any) -> list[dict[str, Any]]:
    kinds = ("good", "bad")
    return [
        {"text": " ".join([kinds[n % 2], *WORDS[2 : 3 + n % 5]]), "label": kinds[n % 2], **other}
        for n in range(num)
    ]


def test_texts_are_framed_by_the_tokenizer_and_labels_are_ids(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = films(7)
    path = write(tmp_path / "a.jsonl", rows)
    data = load_examples(DataSettings(path=path, label_column="label"), tokenizer)
    assert data.label_names == ("bad", "good")
    assert data.train["labels"][:] == [1, 0, 1, 0, 1, 0, 1]
    assert data.train["input_ids"][:] == tokenizer([row["text"] for row in rows])["input_ids"]
    assert "token_type_ids" not in data.train.column_names
    assert data.summary.train.kind == "classification"
    assert data.summary.train.num_masked_tokens == 0


def test_batches_are_those_of_the_tokenizer_and_a_model_takes_them(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = films(4, other="so it was")
    path = write(tmp_path / "a.jsonl", rows)
    settings = DataSettings(path=path, label_column="label", text_pair_column="other")
    data = load_examples(settings, tokenizer)
    batch = Collator.for_tokenizer(tokenizer)([data.train[n] for n in range(4)])
    texts = [row["text"] for row in rows]
    expected = tokenizer(texts, ["so it was"] * 4, padding=True, return_tensors="pt")
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    assert BertForSequenceClassification(config)(**batch).loss.isfinite()


def test_what_is_cut_keeps_the_last_token_of_the_frame(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"text": " ".join(WORDS), "label": "long"}, {"text": "so it", "label": "short"}]
    path = write(tmp_path / "a.jsonl", rows * 2)
    asked = DataSettings(path=path, label_column="label", sequence_length=6)
    num_tokens = len(WORDS) + 2
    with pytest.raises(ValueError, match=rf"\(the longest, line 1, has {num_tokens} tokens\)"):
        load_examples(asked, tokenizer)
    settings = DataSettings(path=path, label_column="label", sequence_length=6, truncation="cut")
    data = load_examples(settings, tokenizer)
    expected = tokenizer(" ".join(WORDS), truncation=True, max_length=6)["input_ids"]
    assert data.train["input_ids"][0] == expected
    assert expected[-1] == tokenizer.sep_token_id
    assert data.summary.train.num_truncated_examples == 2
    assert data.summary.train.num_truncated_tokens == 2 * (num_tokens - 6)
    dropped = DataSettings(path=path, label_column="label", sequence_length=6, truncation="drop")
    assert load_examples(dropped, tokenizer).train["labels"][:] == [1, 1]
    tight = DataSettings(path=path, label_column="label", sequence_length=2, truncation="cut")
    with pytest.raises(ValueError, match="sequence_length=2: the tokenizer adds 2 tokens"):
        load_examples(tight, tokenizer)


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (10, 9, -1, 9)]
    path = write(tmp_path / "a.jsonl", rows)
    assert read_label_names(DataSettings(path=path, label_column="label")) == ("-1", "9", "10")


def test_classes_that_a_parquet_file_names_are_taken(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features)
    path = str(tmp_path / "a.parquet")
    made.to_parquet(path)
    data = load_examples(DataSettings(path=path, label_column="label"), tokenizer)
    assert data.label_names == ("neg", "pos")
    assert data.train["labels"][:] == [1, 0, 1]
    unlabelled = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features)
    unlabelled.to_parquet(path)
    with pytest.raises(ValueError, match=r"row 2, column 'label': -1 is no label"):
        load_examples(DataSettings(path=path, label_column="label"), tokenizer)


def test_an_unknown_label_is_named_before_anything_is_tokenised(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", films(4))
    held_out = write(tmp_path / "b.jsonl", [*films(2), {"text": "a", "label": "goood"}])
    settings = DataSettings(path=path, label_column="label", evaluation_path=held_out)
    untouched: Any = None  # a tokenizer that fails when it is used
    expected = r"b\.jsonl, line 3, column 'label': 'goood' is none of the 2 labels 'bad', 'good'; d"
    with pytest.raises(ValueError, match=expected):
        load_examples(settings, untouched)


BAD = [
    ([{"text": "a", "label": "x"}] * 3, "every row has the label 'x'"),
    ([{"text": "a", "label": n} for n in range(5)], "each of the 5 rows has a label of its own"),
    ([{"text": "a", "label": None}], "line 1, column 'label': a label must be text or a whole num"),
    ([{"text": "a", "label": 1.0}], "whole number, not 1.0"),
]


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_labels_that_are_no_classes(rows: list[Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        read_label_names(DataSettings(path=path, label_column="label"))


@pytest.mark.parametrize(
    ("head", "found", "expected"),
    [
        (["NEG", "POS"], ["NEG", "POS"], {"NEG": 0, "POS": 1}),
        (["NEG", "POS"], ["0", "1"], {"0": 0, "1": 1, "POS": 1}),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "2"], {"2": 2}),
        (["1", "0"], ["0", "1"], {"0": 1, "1": 0}),
        (["NEG", "POS"], ["pos"], None),
        (["1 star", "2 stars", "3 stars"], ["1", "2"], None),
        (["NEG", "POS"], ["0", "1", "2"], None),
        (["LABEL_0", "LABEL_1"], ["bad", "good"], None),
    ],
)
def test_a_trained_head_keeps_its_ids(
    head: list[str], found: list[str], expected: dict[str, int] | None
) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"a\.csv: the labels are .*the model's head knows"):
            Labels.of_head(head, found, path="a.csv")
        return
    labels = Labels.of_head(head, found, path="a.csv")
    assert {text: labels.id_of(text, "here") for text in expected} == expected
