"""TrainingArguments: strategies from code, command line, YAML and JSON; everything else as ever."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import HfArgumentParser

import memrt
from memrt import registry
from memrt.strategies.lisa import Lisa
from tests.contract import SPECS
from tests.trainer_runs import arguments

CANONICAL = ["lisa(layers=1, every=2)", "activation_checkpoint(selective=('matmul',))"]


@pytest.mark.parametrize(
    "strategies",
    [
        ["activation_checkpoint(selective=['matmul'])", "lisa(every=2, layers=1)"],
        [Lisa(layers=1, every=2), "activation_checkpoint(selective=('matmul',))"],
        [
            {"name": "lisa", "layers": 1, "every": 2},
            {"activation_checkpoint": {"selective": ["matmul"]}},
        ],
        [
            '{"name": "lisa", "layers": 1, "every": 2}',
            "activation_checkpoint(selective=['matmul'])",
        ],
    ],
    ids=["strings", "objects", "mappings", "json"],
)
def test_every_way_to_write_strategies_gives_the_same(strategies: Any, tmp_path: Path) -> None:
    assert arguments(tmp_path, strategies=strategies).strategies == CANONICAL


@pytest.mark.parametrize("spec", [*SPECS, *SPECS.values()])
def test_what_comes_out_means_what_went_in(spec: str, tmp_path: Path) -> None:
    ((text),) = arguments(tmp_path, strategies=[spec]).strategies
    assert registry.parse(text) == registry.parse(spec)


def test_the_command_line(tmp_path: Path) -> None:
    parser = HfArgumentParser(memrt.TrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(
        [
            *("--output_dir", str(tmp_path), "--use_cpu"),
            *("--strategies", "lisa(layers=1, every=2)", '{"name": "int8_states"}'),
            *("--memory_report", "--no_stop_on_nonfinite"),
        ],
        look_for_args_file=False,
    )
    assert parsed.strategies == ["lisa(layers=1, every=2)", "int8_states"]
    assert parsed.memory_report is True
    assert parsed.stop_on_nonfinite is False
    (empty,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu"], look_for_args_file=False
    )
    assert empty.strategies == []
    assert empty.memory_report is False
    assert empty.stop_on_nonfinite is True


def test_yaml_and_json_files(tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nmemory_report: true\nstrategies:\n"
        "  - lisa(layers=1, every=2)\n  - activation_checkpoint: {selective: [matmul]}\n"
        "  - int8_states:\n"
    )
    parser = HfArgumentParser(memrt.TrainingArguments)
    (parsed,) = parser.parse_yaml_file(yaml)
    assert parsed.strategies == [CANONICAL[0], "int8_states", CANONICAL[1]]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(parsed.to_dict()))
    (again,) = parser.parse_json_file(path, allow_extra_keys=True)
    assert again.strategies == parsed.strategies
    assert again.memory_report is True


def test_they_are_copied_saved_and_logged(tmp_path: Path) -> None:
    given = arguments(tmp_path, strategies=CANONICAL)
    assert dataclasses.replace(given, learning_rate=0.5).strategies == CANONICAL
    assert json.loads(given.to_json_string())["strategies"] == CANONICAL
    given.to_sanitized_dict()
    torch.save(given, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.strategies == CANONICAL


def test_everything_else_is_as_in_transformers(tmp_path: Path) -> None:
    ours = arguments(tmp_path).to_dict()
    theirs = arguments(tmp_path, cls=transformers.TrainingArguments).to_dict()
    added = {"strategies": [], "memory_report": False, "stop_on_nonfinite": True}
    added |= {"stochastic_rounding": True, "memory_budget": None}
    assert ours == {**theirs, **added}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strategies": "lisa"}, r"must be a list; write \['lisa'\]"),
        ({"strategies": ["liza"]}, "did you mean 'lisa'"),
        ({"strategies": ["lisa", "lisa(layers=1)"]}, "listed twice"),
        ({"strategies": ["lisa(layers=0)"]}, "layers=0"),
        ({"strategies": ["lisa(layer=1)"]}, "no option 'layer'"),
        ({"strategies": ["lisa(layers=x)"]}, "not a plain value"),
        ({"strategies": ['{"name": "lisa"']}, "is not JSON"),
        ({"strategies": [{"layers": 1, "every": 2}]}, "has no 'name'"),
        ({"strategies": {"galore": {"rank": 4}}}, "'rank': 4}}: must be a list"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: must be a number from 0"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3': must be a number from 0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: must"),
        ({"adam_beta2": 1.5}, "adam_beta2=1.5: must be a number from 0 and below 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must"),
        ({"seed": "x"}, "seed='x': must be a whole number"),
        ({"per_device_train_batch_size": 0}, "train_batch_size=0: must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: must be at least 1"),
        ({"memory_report": "yes"}, "memory_report='yes': must be True or False"),
        ({"stop_on_nonfinite": 1}, "stop_on_nonfinite=1"),
        ({"stochastic_rounding": 0}, "stochastic_rounding=0: must be True or False"),
        ({"stochastic_rounding": False}, "has no effect without strategies"),
        (
            {"stochastic_rounding": False, "strategies": ["activation_checkpoint"]},
            "has no effect without strategies that bring a part of the optimizer",
        ),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, **options)
