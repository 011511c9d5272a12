"""Held against what the text itself says: decoding the trained tokens must give the completion."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import memrt.data_files
import memrt.packing
from memrt.data import (
    Collator,
    DataSettings,
    PreparedData,
    byte_level_tokenizer,
    embedded_text,
    load_examples,
)
from memrt.tokenization import IGNORED_LABEL, document_frame, encode_chat

ROOT = Path(__file__).parents[1]
STRINGS = [
    "plain",
    "  spaces , before . punctuation n't 's  ",
    "\n\n\r\n\t\x00\x7f",
    "naïve 你好 🙂‍↕️ \u2028 \ufeff e\u0301",
    "<|eos|> and <|pad|> as text",
    "",
]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "\nThat is 6."},
]
PREFIX_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Shows thoughts only in the last turn, as reasoning models' templates do.
CONTEXTUAL_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}<think>{% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(embedded_text()[:60_000], vocab_size=512)


@pytest.fixture
def own_tokenizer() -> PreTrainedTokenizerFast:
    """One to change."""
    return byte_level_tokenizer(embedded_text()[:20_000], vocab_size=300)


@pytest.fixture(scope="module")
def framing_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2: BOS in front, and a space mark put before every text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    inner.train_from_iterator([embedded_text()[:20_000]], trainer)
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def write_lines(folder: Path, records: Iterable[Any], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_bytes(folder: Path, content: bytes, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def pairs(num: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Add {i} and {i}.", "completion": f" It makes {i + i}."} for i in range(num)
    ]


def trained_text(tokenizer: Any, example: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([t for t in example["labels"] if t != IGNORED_LABEL]))


def given_text(tokenizer: Any, example: dict[str, list[int]]) -> str:
    both = zip(example["input_ids"], example["labels"], strict=True)
    return str(tokenizer.decode([token for token, label in both if label == IGNORED_LABEL]))


# --- the embedded default -------------------------------------------------------------------------


def test_embedded_text_is_enough_english_for_a_default_run() -> None:
    text = embedded_text()
    assert text == embedded_text()
    assert len(text) > 200_000
    assert 'The "assert" statement' in text


def test_tokenizer_returns_every_string(tokenizer: PreTrainedTokenizerFast) -> None:
    for string in STRINGS:
        assert tokenizer.decode(tokenizer.encode(string)) == string


def test_tokenizer_compresses() -> None:
    text = embedded_text()
    trained = byte_level_tokenizer(text)
    assert len(trained) == 4096
    assert len(trained.encode(text, verbose=False)) < len(text) / 3.5


def test_tokenizer_does_not_depend_on_the_process() -> None:
    code = (
        "from memrt.data import byte_level_tokenizer, embedded_text\n"
        "print(byte_level_tokenizer(embedded_text()[:100_000], 1024).backend_tokenizer.to_str())"
    )
    outputs = []
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stderr == ""
        outputs.append(json.loads(result.stdout)["model"])
    assert len(outputs[0]["merges"]) > 700
    assert outputs[0]["vocab"] == outputs[1]["vocab"]
    assert outputs[0]["merges"] == outputs[1]["merges"]


def test_tokenizer_survives_save_and_load(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for string in STRINGS:
        assert loaded.encode(string) == tokenizer.encode(string)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == (
        "<|pad|>",
        "<|bos|>",
        "<|eos|>",
    )


@pytest.mark.parametrize(
    ("text", "vocab_size", "message"),
    [
        ("", 300, "text=''"),
        ("a", 258, "vocab_size=258.*259"),
        ("a", True, "vocab_size=True"),
        ("a", 300.0, "vocab_size=300.0"),
    ],
)
def test_tokenizer_refuses(text: str, vocab_size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        byte_level_tokenizer(text, vocab_size)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": 3}, "path=3"),
        (
            {"path": "a.xlsx"},
            r"path='a.xlsx': must be a \.txt, \.jsonl, .* or a dataset of the Hub",
        ),
        ({"path": "owner/a.xlsx"}, r"path='owner/a.xlsx': must be a \.txt"),
        ({"path": "./name"}, r"path='./name': must be a \.txt"),
        ({"path": "a.jsonl", "columns": ["a"]}, r"columns=\['a'\] has no effect"),
        ({"path": "a.tsv", "columns": ["a", "a"]}, "a name comes twice"),
        ({"path": "a.tsv", "columns": []}, r"columns=\[\]: must be a list"),
        ({"path": "a.tsv", "columns": [1]}, "every name must be text"),
        ({"path": "a.parquet", "quoting": False}, "quoting=False has no effect"),
        ({"path": "a.csv", "quoting": "no"}, "quoting='no': must be True, False or 'auto'"),
        ({"path": "a.csv", "configuration": "x"}, "configuration='x' has no effect"),
        ({"path": "owner/name", "configuration": ""}, "configuration='': must be a name"),
        ({"path": "a.csv", "text_pair_column": "b"}, "two texts go with a label"),
        ({"path": "a.csv", "label_column": "b", "packing": True}, "are never packed"),
        ({"path": "a.csv", "label_column": "text"}, "named twice in text, text"),
        ({"path": "a.txt", "label_column": "b"}, "label_column='b': path='a.txt' is a text with"),
        (
            {"path": "a.csv", "label_column": "b", "evaluation_path": "e.txt"},
            "evaluation_path='e.txt' is a text without columns",
        ),
        ({"evaluation_path": "a.json"}, r"evaluation_path='a.json'.*\.txt, \.jsonl"),
        ({"sequence_length": 1}, "sequence_length=1: .*at least 2"),
        ({"sequence_length": True}, "sequence_length=True"),
        ({"sequence_length": 8.0}, "sequence_length=8.0"),
        ({"packing": "yes"}, "packing='yes'"),
        ({"packing": 1}, "packing=1"),
        ({"packing": False}, "packing=False: path=None is one text stream"),
        ({"path": "a.txt", "packing": False}, r"packing=False: path='a\.txt' is one text stream"),
        ({"truncation": "left"}, "truncation='left'.*error, cut, drop"),
        ({"separator": None}, "separator=None"),
        ({"evaluation_fraction": 1.0}, "evaluation_fraction=1.0"),
        ({"evaluation_fraction": -0.1}, "evaluation_fraction=-0.1"),
        ({"evaluation_fraction": float("nan")}, "evaluation_fraction=nan"),
        ({"evaluation_fraction": True}, "evaluation_fraction=True"),
        ({"evaluation_fraction": 0.1, "evaluation_path": "a.txt"}, "both name evaluation data"),
        ({"seed": -1}, "seed=-1"),
        ({"path": "a.jsonl", "text_column": ""}, "text_column=''"),
        ({"path": "a.jsonl", "prompt_column": "q"}, "prompt_column='q' and completion_column=None"),
        ({"path": "a.jsonl", "prompt_column": "q", "completion_column": "q"}, "both 'q'"),
        ({"path": "a.jsonl", "text_column": "q", "messages_column": "r"}, "text and chat"),
        ({"path": "a.txt", "text_column": "q"}, "text without columns"),
        ({"text_column": "q"}, "text without columns"),
    ],
)
def test_settings_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(**arguments)


def test_settings_survive_json() -> None:
    settings = DataSettings(path="a.jsonl", prompt_column="q", completion_column="a", packing=True)
    assert DataSettings(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


# --- text: packed ---------------------------------------------------------------------------------


def test_text_file_becomes_blocks_of_one_stream(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = "\n\nFirst line.\n\n  An indented one.\r\nLast without end"
    path = write_bytes(tmp_path, text.encode(), "a.txt")
    data = load_examples(DataSettings(path=path, sequence_length=4), tokenizer)
    ids = [token for example in data.train for token in example["input_ids"]]
    expected = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert ids == expected[: len(expected) // 4 * 4]
    assert data.train["labels"][:] == data.train["input_ids"][:]
    assert {len(ids) for ids in data.train["input_ids"]} == {4}
    assert all(mask == [1] * 4 for mask in data.train["attention_mask"])
    summary = data.summary.train
    assert (summary.kind, summary.packed, summary.truncation) == ("text", True, None)
    assert summary.num_leftover_tokens == len(expected) % 4
    assert summary.num_tokens == len(ids)
    assert summary.num_masked_tokens == 0
    assert data.evaluation is None
    assert data.summary.evaluation is None


def test_pieces_give_the_tokens_of_the_whole(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memrt.data_files, "_PIECE_CHARACTERS", 500)
    stream = memrt.data_files.TextStream(path=None)
    pieces = list(stream.pieces())
    assert len(pieces) > 100
    assert "".join(pieces) == embedded_text()
    data = load_examples(DataSettings(sequence_length=64), tokenizer)
    ids = [token for block in data.train["input_ids"] for token in block]
    assert ids == tokenizer.encode(embedded_text(), verbose=False)[: len(ids)]


def test_text_lines_are_joined_with_eos_and_cut(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, [{"text": "one two"}, {"text": "three"}, {"text": "four five"}])
    data = load_examples(DataSettings(path=path, sequence_length=2), tokenizer)
    ids = [token for block in data.train["input_ids"] for token in block]
    whole = "one two<|eos|>three<|eos|>four five<|eos|>"
    assert ids == tokenizer.encode(whole)[: len(ids)]
    assert data.summary.train.num_documents == 3
    assert data.summary.train.num_leftover_tokens == len(tokenizer.encode(whole)) % 2


def test_unpacked_text_keeps_documents_apart(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, [{"text": "one two"}, {"text": "three"}])
    data = load_examples(DataSettings(path=path, packing=False), tokenizer)
    assert [tokenizer.decode(ids) for ids in data.train["input_ids"]] == [
        "one two<|eos|>",
        "three<|eos|>",
    ]
    assert data.summary.train.packed is False


def test_bos_comes_where_the_tokenizer_puts_one(
    framing_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert document_frame(framing_tokenizer) == ([1], 2)
    path = write_lines(tmp_path, pairs(1))
    example = load_examples(DataSettings(path=path), framing_tokenizer).train[0]
    joint = framing_tokenizer.encode("Add 0 and 0. It makes 0.")
    # The space mark of "It" is there once: the joint tokenisation is kept where it can be.
    assert example["input_ids"] == [*joint, 2]


# --- prompt and completion ------------------------------------------------------------------------


def test_prompt_is_masked_and_completion_gets_eos(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, pairs(600))
    data = load_examples(DataSettings(path=path), tokenizer)
    assert len(data.train) == 600
    for index in (0, 7, 599):
        example = data.train[index]
        assert given_text(tokenizer, example) == f"Add {index} and {index}."
        assert trained_text(tokenizer, example) == f" It makes {index + index}.<|eos|>"
        shown = [t for t in example["labels"] if t != IGNORED_LABEL]
        assert shown == example["input_ids"][-len(shown) :]
    summary = data.summary.train
    assert summary.packed is False
    assert summary.num_tokens == sum(len(ids) for ids in data.train["input_ids"])
    assert summary.num_masked_tokens == sum(
        labels.count(IGNORED_LABEL) for labels in data.train["labels"]
    )
    assert summary.longest_example == max(len(ids) for ids in data.train["input_ids"])


def test_prompt_has_its_own_tokens_where_a_merge_would_cross(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prompt, completion = "Call the fun", "ction with a name"
    alone = tokenizer.encode(prompt)
    joint = tokenizer.encode(prompt + completion)
    assert joint[: len(alone)] != alone, "the case needs a merge across the border"
    path = write_lines(tmp_path, [{"prompt": prompt, "completion": completion}])
    example = load_examples(DataSettings(path=path), tokenizer).train[0]
    assert example["input_ids"][: len(alone)] == alone
    assert trained_text(tokenizer, example) == completion + "<|eos|>"


def test_named_columns_and_separator(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_lines(tmp_path, [{"id": 7, "question": "Why?", "answer": "So."}])
    settings = DataSettings(
        path=path, prompt_column="question", completion_column="answer", separator="\n"
    )
    example = load_examples(settings, tokenizer).train[0]
    assert given_text(tokenizer, example) == "Why?\n"
    assert trained_text(tokenizer, example) == "So.<|eos|>"


def test_packed_pairs_leave_out_blocks_with_only_prompt(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    long_prompt = "word " * 100
    path = write_lines(tmp_path, [{"prompt": long_prompt, "completion": "yes"}, *pairs(3)])
    data = load_examples(DataSettings(path=path, sequence_length=8, packing=True), tokenizer)
    summary = data.summary.train
    assert summary.num_untrainable_examples >= len(tokenizer.encode(long_prompt)) // 8 - 1
    assert summary.num_examples == len(data.train) > 0
    for example in data.train:
        assert len(example["input_ids"]) == 8
        assert any(label != IGNORED_LABEL for label in example["labels"][1:])


# --- truncation -----------------------------------------------------------------------------------


def long_and_short(folder: Path) -> str:
    records = [*pairs(3), {"prompt": "Say it.", "completion": " word" * 200}]
    return write_lines(folder, records)


def test_too_long_is_refused_unless_something_is_said(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = long_and_short(tmp_path)
    longest = len(tokenizer.encode("Say it." + " word" * 200)) + 1
    with pytest.raises(
        ValueError, match=rf"1 of 4 .*line 4, has {longest} tokens.*truncation='cut'"
    ):
        load_examples(DataSettings(path=path, sequence_length=64), tokenizer)
    data = load_examples(DataSettings(path=path, sequence_length=longest), tokenizer)
    assert len(data.train) == 4


def test_cut_keeps_the_beginning_and_counts(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = long_and_short(tmp_path)
    data = load_examples(DataSettings(path=path, sequence_length=64, truncation="cut"), tokenizer)
    expected = tokenizer.encode("Say it." + " word" * 200)
    assert data.train[3]["input_ids"] == expected[:64]
    summary = data.summary.train
    assert summary.truncation == "cut"
    assert (summary.num_truncated_examples, summary.num_examples) == (1, 4)
    assert summary.num_truncated_tokens == len(expected) + 1 - 64


def test_drop_leaves_out_and_counts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = long_and_short(tmp_path)
    data = load_examples(DataSettings(path=path, sequence_length=64, truncation="drop"), tokenizer)
    summary = data.summary.train
    assert len(data.train) == summary.num_examples == 3
    assert (summary.num_dropped_examples, summary.num_truncated_examples) == (1, 0)


def test_cut_leaves_out_examples_without_completion(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, [{"prompt": "word " * 100, "completion": "yes"}, *pairs(1)])
    data = load_examples(DataSettings(path=path, sequence_length=32, truncation="cut"), tokenizer)
    assert data.summary.train.num_untrainable_examples == 1
    assert len(data.train) == 1
    path = write_lines(tmp_path, [{"prompt": "word " * 100, "completion": "yes"}])
    with pytest.raises(ValueError, match=r"nothing but prompts.*longer sequence_length"):
        load_examples(DataSettings(path=path, sequence_length=32, truncation="cut"), tokenizer)


def test_settings_without_effect_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="truncation='cut' has no effect on packed data"):
        load_examples(DataSettings(truncation="cut"), tokenizer)
    path = write_lines(tmp_path, [{"text": "word"}])
    with pytest.raises(ValueError, match="separator=' ' has no effect on text data"):
        load_examples(DataSettings(path=path, separator=" "), tokenizer)


# --- chat -----------------------------------------------------------------------------------------


def assistant_turns(conversation: list[dict[str, str]], end: str) -> str:
    return "".join(m["content"] + end for m in conversation if m["role"] == "assistant")


@pytest.mark.parametrize("template", ["own", "prefix"])
def test_chat_trains_on_the_assistant_only(
    template: str, own_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if template == "prefix":
        own_tokenizer.chat_template = PREFIX_TEMPLATE
    path = write_lines(tmp_path, [{"messages": CONVERSATION}])
    data = load_examples(DataSettings(path=path), own_tokenizer)
    example = data.train[0]
    assert trained_text(own_tokenizer, example) == assistant_turns(CONVERSATION, "<|eos|>")
    rendered = own_tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert own_tokenizer.decode(example["input_ids"]) == rendered
    assert data.summary.train.kind == "chat"
    assert data.summary.train.packed is False


def test_both_ways_to_mask_a_chat_agree(own_tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = encode_chat(own_tokenizer, CONVERSATION)
    plain = own_tokenizer.chat_template
    for tag in ("{% generation %}", "{% endgeneration %}"):
        assert tag in plain
        plain = plain.replace(tag, "")
    own_tokenizer.chat_template = plain
    prefixes = encode_chat(own_tokenizer, CONVERSATION)
    assert blocks.input_ids.tolist() == prefixes.input_ids.tolist()
    differing = [
        own_tokenizer.decode(int(token))
        for token, ours, theirs in zip(
            blocks.input_ids, blocks.labels, prefixes.labels, strict=True
        )
        if ours != theirs
    ]
    # The rendering of a turn ends with the line feed after EOS, which the block leaves out.
    assert differing == ["\n", "\n"]


def test_a_token_over_the_border_of_a_turn_is_not_trained_on(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.tokenize(" function") == ["Ġfunction"]
    ours = copy.deepcopy(tokenizer)
    ours.chat_template = PREFIX_TEMPLATE.replace("<assistant>", " fun").replace(
        "<{{ m['role'] }}>", "{{ ' fun' if m['role'] == 'assistant' else 'user' }}"
    )
    messages = [
        {"role": "user", "content": "Call it."},
        {"role": "assistant", "content": "ction done"},
    ]
    encoded = encode_chat(ours, messages)
    trained = ours.decode(encoded.labels[encoded.labels != IGNORED_LABEL])
    assert trained == " done<|eos|>"


def test_template_that_renders_by_context_is_refused(
    own_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own_tokenizer.chat_template = CONTEXTUAL_TEMPLATE
    path = write_lines(tmp_path, [{"messages": CONVERSATION}])
    with pytest.raises(
        ValueError, match=r"line 1: the chat template renders messages 1 to 3 alone"
    ):
        load_examples(DataSettings(path=path), own_tokenizer)


def test_template_that_begins_turns_unlike_its_prompt_is_refused(
    own_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own_tokenizer.chat_template = PREFIX_TEMPLATE + (
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    path = write_lines(tmp_path, [{"messages": CONVERSATION}])
    with pytest.raises(ValueError, match="line 1: the chat template does not begin message 3 with"):
        load_examples(DataSettings(path=path), own_tokenizer)


def test_template_that_skips_text_is_refused(
    own_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    path = write_lines(tmp_path, [{"messages": CONVERSATION}])
    with pytest.raises(ValueError, match="line 1: the chat template renders nothing of what"):
        load_examples(DataSettings(path=path), own_tokenizer)


def test_chat_errors_name_the_line(own_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own_tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        + PREFIX_TEMPLATE
    )
    path = write_lines(tmp_path, [{"messages": CONVERSATION[1:]}, {"messages": CONVERSATION}])
    with pytest.raises(
        ValueError, match="line 2: the chat template refuses the messages: user first"
    ):
        load_examples(DataSettings(path=path), own_tokenizer)
    path = write_lines(tmp_path, [{"messages": CONVERSATION[2:3]}])
    own_tokenizer.chat_template = PREFIX_TEMPLATE
    with pytest.raises(ValueError, match="line 1: the first message is the assistant's"):
        load_examples(DataSettings(path=path), own_tokenizer)
    own_tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template=None.*chat \(instruct\)"):
        load_examples(DataSettings(path=path), own_tokenizer)


def test_packed_chat_is_possible_when_asked(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, [{"talk": CONVERSATION}] * 4)
    settings = DataSettings(path=path, messages_column="talk", packing=True, sequence_length=32)
    data = load_examples(settings, tokenizer)
    assert data.summary.train.packed is True
    assert {len(ids) for ids in data.train["input_ids"]} == {32}


def test_tokenizer_without_eos_is_refused(own_tokenizer: PreTrainedTokenizerFast) -> None:
    own_tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer\.eos_token=None"):
        load_examples(DataSettings(), own_tokenizer)


# --- bad files ------------------------------------------------------------------------------------

GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.jsonl: the file is empty"),
        (b"\xef\xbb\xbf", "data.jsonl: the file is empty"),
        (b"\n", "line 1: the line is empty"),
        (GOOD + b"  \n" + GOOD, "line 2: the line is empty"),
        (GOOD + GOOD + b"\n", "line 3: the line is empty"),
        (GOOD + b'{"text": "cut\n', "line 2: malformed JSON at character 14: Invalid control"),
        (GOOD + b"{'text': 'python'}\n", "line 2: malformed JSON at character 2"),
        (GOOD + GOOD.strip() + GOOD, "line 2: malformed JSON at character 17: Extra data"),
        (GOOD + b'["text"]\n', r"line 2: must be a JSON object .*not \[\"text\"\]"),
        (GOOD + b"[" * 100_000, "line 2: JSON that cannot be read"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 1: JSON that cannot be read"),
        (GOOD + b'{"Text": "a"}\n', "line 2: no column 'text'.*'Text'; did you mean 'Text'"),
        (GOOD + b"{}\n", "line 2: no column 'text'; the columns are none"),
        (GOOD + b'{"text": 3}\n', "line 2, column 'text': must be text, not 3"),
        (GOOD + b'{"text": null}\n', "line 2, column 'text': must be text, not null"),
        (GOOD + b'{"text": ""}\n', "line 2, column 'text': the text is empty"),
        (GOOD + b'{"text": " \\n"}\n', "line 2, column 'text': the text is empty"),
        (GOOD + b'{"text": "a\\ud800"}\n', "line 2, column 'text': character 2 is half of a surr"),
        (
            GOOD + b'{"text": "a\xff"}\n',
            "line 2: byte 12 of the line .offset 28 of the file. is not",
        ),
        (
            b'{"question": "a", "answer": "b"}\n',
            "line 1: none of .*'question', 'answer': name yours",
        ),
        (b'{"text": "a", "messages": []}\n', "line 1: more than one of"),
        (b'{"prompt": "a", "completion": ""}', "line 1, column 'completion': the text is empty"),
        (b'{"messages": []}', r"column 'messages': must be a list of messages, not \[\]"),
        (b'{"messages": "hi"}', 'must be a list of messages, not "hi"'),
        (b'{"messages": [3]}', "message 1: must be an object with 'role' and 'content', not 3"),
        (b'{"messages": [{"role": "user"}]}', "message 1: no column 'content'"),
        (
            b'{"messages": [{"role": "user", "content": null}]}',
            "message 1, 'content': must be text, not null",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "line 1, column 'messages': no message has the role 'assistant'",
        ),
    ],
)
def test_bad_lines_are_named(
    content: bytes, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_bytes(tmp_path, content)
    with pytest.raises(ValueError, match=message) as raised:
        load_examples(DataSettings(path=path, sequence_length=2), tokenizer)
    assert str(raised.value).startswith(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty or blank"),
        (b" \n\n\t", "the file is empty or blank"),
        (b"good\nbad \xe9\n", "line 2: byte 5 of the line .offset 9 of the file. is not UTF-8"),
        (b"\xef\xbb\xbfbad \xe9\n", "line 1: byte 8 of the line .offset 7 of the file. is not"),
        (b"two words", "[0-9]+ tokens do not fill one block of sequence_length=64; give"),
    ],
)
def test_bad_texts_are_named(
    content: bytes, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_bytes(tmp_path, content, "data.txt")
    with pytest.raises(ValueError, match=message):
        load_examples(DataSettings(path=path, sequence_length=64), tokenizer)


def test_the_length_that_the_error_names_fits(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_bytes(tmp_path, b"a few words of text", "data.txt")
    num = len(tokenizer.encode("a few words of text")) + 1
    with pytest.raises(ValueError, match=f"give sequence_length={num} or less"):
        load_examples(DataSettings(path=path, sequence_length=num + 1), tokenizer)
    assert len(load_examples(DataSettings(path=path, sequence_length=num), tokenizer).train) == 1


def test_missing_files_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path='.*none\.jsonl': there is no such file"):
        load_examples(DataSettings(path=str(tmp_path / "none.jsonl")), tokenizer)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"evaluation_path='.*folder\.txt': this is a folder"):
        load_examples(DataSettings(evaluation_path=str(tmp_path / "folder.txt")), tokenizer)


def test_byte_order_mark_is_no_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_bytes(tmp_path, b"\xef\xbb\xbf" + GOOD)
    data = load_examples(DataSettings(path=path, packing=False), tokenizer)
    assert tokenizer.decode(data.train[0]["input_ids"]) == "fine<|eos|>"


def test_unused_columns_may_hold_anything(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """What Arrow's JSON reader would refuse or turn into a timestamp."""
    records = [{"text": "2020-01-01", "x": 1}, {"text": "2020-01-02", "x": "a"}, {"text": "b"}]
    path = write_lines(tmp_path, records)
    data = load_examples(DataSettings(path=path, packing=False), tokenizer)
    decoded = [tokenizer.decode(ids) for ids in data.train["input_ids"]]
    assert decoded == ["2020-01-01<|eos|>", "2020-01-02<|eos|>", "b<|eos|>"]


# --- evaluation data ------------------------------------------------------------------------------


def rows(data: Any) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in data["input_ids"]]


def test_fraction_splits_documents_once_and_for_all(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, pairs(50))
    whole = rows(load_examples(DataSettings(path=path), tokenizer).train)

    def load(seed: int) -> PreparedData:
        settings = DataSettings(path=path, evaluation_fraction=0.2, seed=seed)
        return load_examples(settings, tokenizer)

    data = load(0)
    assert data.evaluation is not None
    train, evaluation = rows(data.train), rows(data.evaluation)
    assert (len(train), len(evaluation)) == (40, 10)
    assert sorted(train + evaluation) == sorted(whole)
    assert train == sorted(train, key=whole.index)
    again, other = load(0), load(1)
    assert other.evaluation is not None
    assert rows(again.train) == train
    assert again.summary == data.summary
    assert rows(other.evaluation) != evaluation


def test_packed_documents_are_split_before_they_are_joined(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, [{"text": f"{i:03d} " * 20} for i in range(40)])
    settings = DataSettings(path=path, sequence_length=16, evaluation_fraction=0.25)
    data = load_examples(settings, tokenizer)
    assert data.evaluation is not None

    def numbers(split: Any) -> set[str]:
        text = " ".join(tokenizer.decode(ids) for ids in split["input_ids"])
        return {word for word in text.replace("<|eos|>", " ").split() if len(word) == 3}

    assert not numbers(data.train) & numbers(data.evaluation)
    assert data.summary.evaluation is not None
    assert data.summary.train.num_documents == 30
    assert data.summary.evaluation.num_documents == 10
    num_tokens = len(tokenizer.encode("007 " * 20 + "<|eos|>"))
    for summary in (data.summary.train, data.summary.evaluation):
        assert summary.num_tokens == summary.num_examples * 16
        total = summary.num_documents * num_tokens
        assert 0 < summary.num_leftover_tokens == total - summary.num_tokens


def test_text_is_split_by_blocks(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = load_examples(DataSettings(sequence_length=128), tokenizer)
    split = load_examples(DataSettings(sequence_length=128, evaluation_fraction=0.1), tokenizer)
    assert split.evaluation is not None
    assert sorted(rows(split.train) + rows(split.evaluation)) == sorted(rows(whole.train))
    assert len(split.evaluation) == round(len(whole.train) * 0.1)
    assert split.summary.train.num_leftover_tokens == whole.summary.train.num_leftover_tokens > 0


def test_small_splits(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_lines(tmp_path, pairs(2))
    for fraction in (0.01, 0.99):
        data = load_examples(DataSettings(path=path, evaluation_fraction=fraction), tokenizer)
        assert data.evaluation is not None
        assert (len(data.train), len(data.evaluation)) == (1, 1)
    path = write_lines(tmp_path, pairs(1))
    with pytest.raises(ValueError, match="has one record and a split needs two"):
        load_examples(DataSettings(path=path, evaluation_fraction=0.5), tokenizer)
    path = write_bytes(tmp_path, b"some words here", "a.txt")
    settings = DataSettings(path=path, evaluation_fraction=0.5, sequence_length=64)
    with pytest.raises(ValueError, match=r"0 block\(s\) of sequence_length=64 and a split"):
        load_examples(settings, tokenizer)
    path = write_lines(tmp_path, [{"text": "word " * 20}, {"text": "word " * 20}, {"text": "a"}])
    settings = DataSettings(path=path, evaluation_fraction=0.9, sequence_length=64)
    with pytest.raises(ValueError, match=r"\(train part\): [0-9]+ tokens do not fill one block"):
        load_examples(settings, tokenizer)


def test_evaluation_file_has_its_own_kind(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train = write_lines(tmp_path, pairs(3))
    text = write_bytes(tmp_path, b"held out text " * 20, "held_out.txt")
    settings = DataSettings(path=train, evaluation_path=text, sequence_length=32)
    data = load_examples(settings, tokenizer)
    assert data.evaluation is not None
    assert data.summary.evaluation is not None
    assert (data.summary.train.packed, data.summary.evaluation.packed) == (False, True)
    assert data.summary.evaluation.source == text
    assert json.loads(json.dumps(data.summary.as_dict()))["train"]["num_documents"] == 3


def test_every_file_is_checked_before_the_first_is_tokenised(tmp_path: Path) -> None:
    train = write_lines(tmp_path, pairs(3))
    bad = write_bytes(tmp_path, b"{\n", "bad.jsonl")
    untouched: Any = None  # a tokenizer that fails when it is used
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: malformed"):
        load_examples(DataSettings(path=train, evaluation_path=bad), untouched)


# --- what is left behind --------------------------------------------------------------------------


def test_loading_is_silent_and_leaves_no_files(tmp_path: Path) -> None:
    path = write_lines(tmp_path, [{"text": "word " * 4000}] * 10)
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "from memrt.data import *\n"
        "import sys\n"
        "tokenizer = byte_level_tokenizer('word ' * 99, 300)\n"
        "tokenizer.model_max_length = 16\n"
        "settings = DataSettings(path=sys.argv[1], sequence_length=8, evaluation_fraction=0.2)\n"
        "data = load_examples(settings, tokenizer)\n"
        "assert not data.train.cache_files\n"
    )
    names = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "TMPDIR")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    (home / "TMPDIR").mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, path],
        env={**kept, "HOME": str(home), **{name: str(home / name) for name in names}},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout + result.stderr == ""
    left = [file for file in home.rglob("*") if file.is_file() and "torch" not in str(file)]
    assert left == []


# --- batches --------------------------------------------------------------------------------------

EXAMPLES = [
    {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]},
    {"input_ids": [8], "attention_mask": [1], "labels": [8]},
]


def test_collator_pads_to_the_longest() -> None:
    batch = Collator(pad_token_id=9)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collator_pads_to_a_fixed_length() -> None:
    batch = Collator(pad_token_id=9, length=5)(EXAMPLES)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 5)}
    with pytest.raises(ValueError, match="length=2: an example has 3 tokens; give length=3"):
        Collator(pad_token_id=9, length=2)(EXAMPLES)


def test_collator_refuses(own_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"features=\[\]"):
        Collator(pad_token_id=9)([])
    with pytest.raises(ValueError, match="no attention_mask, labels"):
        Collator(pad_token_id=9)([{"input_ids": [1]}])
    with pytest.raises(ValueError, match="pad_token_id=-1"):
        Collator(pad_token_id=-1)
    with pytest.raises(ValueError, match="length=0"):
        Collator(pad_token_id=9, length=0)
    assert Collator.for_tokenizer(own_tokenizer).pad_token_id == own_tokenizer.pad_token_id
    own_tokenizer.pad_token = None
    assert Collator.for_tokenizer(own_tokenizer).pad_token_id == own_tokenizer.eos_token_id
    own_tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token=None and tokenizer\.eos_token=No"):
        Collator.for_tokenizer(own_tokenizer)


def test_batch_shape_is_the_largest_batch(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, pairs(30))
    dataset = load_examples(DataSettings(path=path), tokenizer).train
    longest = max(len(ids) for ids in dataset["input_ids"])
    collator = Collator.for_tokenizer(tokenizer)
    assert collator.batch_shape(dataset, batch_size=4) == (4, longest)
    assert collator.batch_shape(dataset, batch_size=64) == (30, longest)
    shortest = min(range(30), key=lambda i: len(dataset[i]["input_ids"]))
    some = dataset.select([shortest])
    assert (
        collator.batch_shape(some, batch_size=4) == (1, len(some[0]["input_ids"])) != (1, longest)
    )
    fixed = Collator.for_tokenizer(tokenizer, length=100)
    assert fixed.batch_shape(dataset, batch_size=4) == (4, 100)
    with pytest.raises(ValueError, match="batch_size=0"):
        collator.batch_shape(dataset, batch_size=0)
    with pytest.raises(ValueError, match="no examples"):
        collator.batch_shape(dataset.select([]), batch_size=1)


def test_batches_reach_a_model_through_a_loader(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_lines(tmp_path, pairs(6))
    dataset = load_examples(DataSettings(path=path), tokenizer).train
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, collate_fn=Collator.for_tokenizer(tokenizer)
    )
    batches = list(loader)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert num_tokens == sum(len(ids) for ids in dataset["input_ids"])


# --- real files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_data() -> Path:
    folder = os.environ.get("MEMRT_DATA")
    if not folder:
        pytest.skip("MEMRT_DATA is not set: it names the folder with gsm8k-train.jsonl and texts")
    return Path(folder)


def test_gsm8k(real_data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = real_data / "gsm8k-train.jsonl"
    settings = DataSettings(
        path=str(path),
        prompt_column="question",
        completion_column="answer",
        separator="\n",
        sequence_length=512,
        truncation="drop",
        evaluation_fraction=0.05,
    )
    data = load_examples(settings, tokenizer)
    assert data.evaluation is not None
    assert data.summary.evaluation is not None
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = (data.summary.train, data.summary.evaluation)
    kept = sum(part.num_examples for part in counts)
    assert kept + sum(part.num_dropped_examples for part in counts) == len(records)
    assert kept == len(data.train) + len(data.evaluation)
    expected = {(r["question"] + "\n", r["answer"] + "<|eos|>") for r in records}
    for index in range(0, len(data.train), 50):
        example = data.train[index]
        pair = given_text(tokenizer, example), trained_text(tokenizer, example)
        assert pair in expected


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "wikitext2-valid.txt"])
def test_real_texts(name: str, real_data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = real_data / name
    data = load_examples(DataSettings(path=str(path), sequence_length=1024), tokenizer)
    text = path.read_bytes().decode("utf-8")
    ids = [token for block in data.train["input_ids"] for token in block]
    decoded = tokenizer.decode(ids)
    # The last token may hold only a part of a character.
    assert (text + "<|eos|>").startswith(decoded.rstrip("\ufffd"))
    assert len(text) - len(decoded) <= data.summary.train.num_leftover_tokens * 100
