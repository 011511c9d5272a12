"""The settings of `memrt train`: three ways to write them, one tree, and errors that say more."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from memrt.arguments import TrainingArguments
from memrt.cli.train_keys import keys
from memrt.data import DataSettings
from tests.cli.conftest import Command

FILE = """\
output: ${name}-run
seed: 3
model: {path: my/model, tokenizer: other}
data:
  path: a.jsonl
  prompt_column: question
  completion_column: "2"
  separator: "\\n"
  evaluation_fraction: 0.1
strategies: [int8_states, {lisa: {layers: 3}}]
training:
  learning_rate: 1e-3
  bf16: true
  use_cpu: true
  save_strategy: no
  lr_scheduler_kwargs: {num_cycles: 2}
"""

DOTLIST = [
    "output=x-run",
    "seed=3",
    "model=my/model",
    "model.tokenizer=other",
    "data=a.jsonl",
    "data.prompt_column=question",
    "completion_column=2",
    "separator=\n",
    "data.evaluation_fraction=.1",
    "strategies=lisa(layers=3)+int8_states",
    "training.learning_rate=1e-3",
    "training.bf16=true",
    "use_cpu=true",
    "save_strategy=no",
    "training.lr_scheduler_kwargs.num_cycles=2",
]

FLAGS = [
    *("--output", "x-run", "--seed=3", "--model", "my/model", "--tokenizer", "other"),
    *("--data", "a.jsonl", "--prompt-column", "question", "--completion-column", "2"),
    *("--separator", "\n", "--evaluation-fraction", "0.1"),
    *("--strategies", "int8_states", "lisa(layers=3)"),
    *("--lr", "0.001", "--bf16", "--use-cpu", "--save-strategy", "no"),
    *("--lr_scheduler_kwargs", "{num_cycles: 2}"),
]


def _settings(memrt: Command, *words: object) -> dict[str, Any]:
    result = memrt("train", *words, "--print-config")
    assert result.code == 0, result.err
    found: dict[str, Any] = yaml.safe_load(result.out)
    return found


def test_file_dotlist_and_flags_give_one_tree(memrt: Command) -> None:
    Path("c.yaml").write_text(FILE.replace("${name}", "x"))
    from_file = _settings(memrt, "c.yaml")
    assert from_file == _settings(memrt, *DOTLIST) == _settings(memrt, *FLAGS)
    assert from_file["strategies"] == ["lisa(layers=3)", "int8_states"]
    assert from_file["data"]["separator"] == "\n"
    assert from_file["data"]["completion_column"] == "2"
    assert from_file["training"]["save_strategy"] == "no"
    assert from_file["training"]["eval_strategy"] == "epoch"


def test_what_is_printed_is_a_config_file_of_the_same_settings(memrt: Command) -> None:
    printed = memrt("train", *FLAGS, "--print-config").out
    Path("printed.yaml").write_text(printed)
    assert memrt("train", "printed.yaml", "--print-config").out == printed


def test_words_win_over_the_file_and_later_words_over_earlier_ones(memrt: Command) -> None:
    Path("c.yaml").write_text(FILE.replace("${name}", "x"))
    found = _settings(memrt, "--lr", "1", "c.yaml", "learning_rate=2", "--learning-rate", "3")
    assert found["training"]["learning_rate"] == 3


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], {"max_steps": 50, "eval_strategy": "steps", "evaluation_fraction": 0.05}),
        (["--epochs", "1"], {"num_train_epochs": 1, "max_steps": None, "eval_steps": 25}),
        (["data.evaluation_fraction=0"], {"evaluation_fraction": 0, "eval_strategy": "no"}),
        (
            ["data.evaluation_path=held_out.txt"],
            {"evaluation_path": "held_out.txt", "evaluation_fraction": 0, "eval_steps": 25},
        ),
    ],
    ids=str,
)
def test_the_example_run_gives_way_to_what_was_typed(
    memrt: Command, words: list[str], settings: dict[str, Any]
) -> None:
    tree = _settings(memrt, *words)
    found = {**tree["data"], **tree["training"]}
    assert {name: found.get(name) for name in settings} == settings


def test_interpolations_see_the_words(memrt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMRT_TEST_FOLDER", "somewhere")
    Path("c.yaml").write_text(
        "output: run-${seed}\nmodel: embedded\ndata: ${oc.env:MEMRT_TEST_FOLDER}/a.txt\n"
    )
    found = _settings(memrt, "c.yaml", "seed=5")
    assert found["output"] == "run-5"
    assert found["data"]["path"] == "somewhere/a.txt"
    monkeypatch.delenv("MEMRT_TEST_FOLDER")
    result = memrt("train", "c.yaml", "--print-config")
    assert result.code == 1
    assert "c.yaml: data.path: " in result.error
    assert "'MEMRT_TEST_FOLDER' not found" in result.error


def test_every_field_is_a_key_and_the_help_lists_it(memrt: Command) -> None:
    """What is left out is refused by name."""
    result = memrt("train", "--help")
    assert result.code == 0
    listed = {line.split()[0] for line in result.out.splitlines() if line.startswith("  ")}
    for section, cls in (("data", DataSettings), ("training", TrainingArguments)):
        for each in fields(cls):
            name = f"{section}.{each.name}"
            if name in keys():
                assert each.name in listed
            else:
                told = memrt("train", f"{name}=1", "--print-config")
                assert told.code == 1
                assert f"{name}: " in told.error


ON = ["model=m", "data=d.txt"]
BAD = [
    (["learning_rte=1"], "unknown key 'learning_rte'; did you mean 'training.learning_rate'?"),
    (["--learning-rte", "1"], "did you mean 'training.learning_rate'?"),
    (["training.lr=1"], "unknown key 'training.lr'; did you mean 'training.learning_rate'?"),
    (["training.batch_size=1"], "did you mean 'training.per_device_train_batch_size'?"),
    (["data.pth=x"], "unknown key 'data.pth'; did you mean 'data.path'?"),
    (["--path", "x"], "'path' is in more than one section: name model.path or data.path"),
    (["training.learning_rate=fast"], "training.learning_rate='fast': must be a number"),
    (["--batch", "2.5"], "per_device_train_batch_size=2.5: must be a whole number"),
    (["--batch", "true"], "per_device_train_batch_size=true: must be a whole number"),
    (["training.bf16=1"], "training.bf16=1: must be true or false"),
    (["dtype=float8"], "dtype='float8': must be one of float32, bfloat16"),
    (["--optim", "adamw_trch"], "did you mean 'adamw_torch'?"),
    (["truncation=cutt"], "must be one of error, cut, drop or null; did you mean 'cut'?"),
    (["--strategies", "lissa"], "unknown strategy 'lissa'; did you mean 'lisa'?"),
    (["--strategies", "lisa(layer=1)"], "did you mean 'layers'?"),
    (["training.output_dir=x"], "training.output_dir: set output"),
    (["training.seed=1"], "training.seed: set seed"),
    (["--fsdp", "full_shard"], "training.fsdp: `memrt train` is one process"),
    (["data.evaluation_fraction=2"], "data.evaluation_fraction=2: must be a number from 0"),
    (["evaluation_fraction=.1", "evaluation_path=e.txt"], "both name evaluation data"),
    (["--eval-strategy", "steps"], "there is nothing to evaluate on"),
    (["model.config={model_type: llama}"], "both say what is trained"),
    (["--steps", "4", "--epochs", "2"], "has no effect beside training.max_steps=4"),
    (["--lr"], "--lr needs a value"),
    (["--steps", "0"], "steps=0: training.max_steps must be at least 1, or -1 for"),
    (["training.max_steps=-2"], "training.max_steps=-2: must be at least 1"),
    (["--epochs", "0"], "epochs=0: training.num_train_epochs must be above 0"),
    (["num_train_epochs=-1"], "num_train_epochs=-1: training.num_train_epochs must be above"),
    (["--batch", "0"], "batch=0: training.per_device_train_batch_size must be at least 1"),
    (["--per-device-eval-batch-size", "0"], "per_device_eval_batch_size must be at least 1"),
    (["accumulation=0"], "accumulation=0: training.gradient_accumulation_steps must be"),
    (["--lr", "-1"], "lr=-1: training.learning_rate must be a number from 0"),
    (["--lr", ".nan"], "lr=nan: training.learning_rate must be a number from 0"),
    (["memory_budget=24"], "memory_budget='24': 24 would be bytes; did you mean 24GiB?"),
    (["memory_budget=much"], "memory_budget='much' is neither a known card nor a size"),
    (["--strategies", "[lisa, [galore]]"], "['galore'] in the list must be text or a mapping"),
    (["data.columns=[a, 2]"], "data.columns=['a', 2]: 2 in the list must be text"),
    (["separator=${"], "separator='${': "),
    (["--output", "${x"], "output='${x': "),
    (["warmup_steps=.nan"], "warmup_steps=nan: training.warmup_steps must be a number from 0"),
    (["label_smoothing_factor=2"], "training.label_smoothing_factor must be a number from 0"),
    (["neftune_noise_alpha=-1"], "training.neftune_noise_alpha must be a number from 0"),
    (["dataloader_num_workers=-1"], "training.dataloader_num_workers must be at least 0"),
    (["log_level=loud"], "log_level='loud': training.log_level must be one of "),
    (["data_seed=99999999999999999999"], "training.data_seed must be from 0 to 4294967295"),
    (["seed=4294967296"], "seed=4294967296: must be from 0 to 4294967295"),
    (["--save-steps", "0"], "save-steps=0: training.save_steps must be above 0, or set training.s"),
    (["logging_steps=-1"], "training.logging_steps must be above 0"),
    (["eval_strategy=steps", "eval_steps=0", "evaluation_fraction=.1"], "eval_steps must be abo"),
    (["trainig=1"], "unknown key 'trainig'; did you mean 'training'?"),
    (["-x"], "unknown argument '-x'"),
    (["a.yaml", "b.yaml"], "unexpected 'b.yaml' after the config file 'a.yaml'"),
    (["--resume", "--overwrite"], "give one"),
    (["--json=1"], "--json takes no value"),
    (["missing.yaml"], "the config file 'missing.yaml' does not exist"),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_setting_is_one_line(memrt: Command, words: list[str], expected: str) -> None:
    result = memrt("train", *ON, *words, "--print-config")
    assert result.code == 1
    assert result.out == ""
    assert expected in result.error
    assert "Traceback" not in result.err


FILES = [
    ("model: [", "not a readable YAML file"),
    ("- a\n- b\n", "must hold keys with values"),
    ("modl: {path: x}\n", "unknown key 'modl', which holds keys; did you mean 'model'?"),
    ("trainig: {max_steps: 1}\n", "did you mean 'training'?"),
    ("wandb: {name: x}\n", "the sections are model, data, training"),
    (
        "model: x\ndata: y.txt\ntraining: {max_steps: 0}\n",
        "training.max_steps=0: must be at least 1",
    ),
    ("learning_rate: 1\n", "unknown key 'learning_rate'; did you mean 'training.learning_rate'?"),
    ("training: fast\n", "training='fast': must be a section with keys"),
    ("strategies: lisa\n", "strategies='lisa': must be a list"),
    (
        "model: embedded\ndata: embedded\nstrategies: [{lisa: {layer: 1}}]\n",
        "did you mean 'layers'",
    ),
    ("model: x\n", "data.path: name a .txt, .jsonl, .csv, .tsv or .parquet file"),
    ("data: x.txt\n", "model.path: name a folder"),
    ("seed: 1\nseed: 2\n", "duplicate"),
]


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_a_bad_file_is_one_line(memrt: Command, text: str, expected: str) -> None:
    Path("c.yaml").write_text(text)
    result = memrt("train", "c.yaml", "--print-config")
    assert result.code == 1
    assert expected in result.error
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("text", "word"), [("training: fast\n", "lr=1"), ("data: [a.txt]\n", "data.path=b.txt")]
)
def test_words_do_not_hide_what_is_wrong_in_the_file(memrt: Command, text: str, word: str) -> None:
    Path("c.yaml").write_text(text)
    result = memrt("train", "c.yaml", word, "--print-config")
    assert result.code == 1
    assert "must be a section with keys" in result.error


CONFIGS = [
    ("{model_type: lama}", "model.config.model_type='lama'", "did you mean 'llama'?"),
    ("{hidden_size: 8}", "model.config.model_type=None", "such as llama"),
    ("{model_type: llama, hiden_size: 8}", "'hiden_size'", "did you mean 'hidden_size'?"),
    ("{model_type: llama, hidden_size: big}", "hidden_size", "expected int"),
]


@pytest.mark.parametrize(("config", "name", "remedy"), CONFIGS)
def test_a_bad_inline_config_is_one_line(
    memrt: Command, config: str, name: str, remedy: str
) -> None:
    result = memrt("train", "--model.config", config, "--data", "embedded")
    assert result.code == 1
    assert name in result.error
    assert remedy in result.error
    assert list(Path().iterdir()) == []
