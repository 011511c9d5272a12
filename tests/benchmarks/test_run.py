"""The runner, and every benchmark with its smallest settings."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render, run
from benchmarks.optimizer_step import whole_steps
from benchmarks.plan_accuracy.benchmark import rise_in_trace
from benchmarks.quality import run as quality
from benchmarks.quality import speeds, sst2_record, why
from benchmarks.record import RESULTS, ROOT, check_record
from benchmarks.shapes import SHAPES, llama_config

NAMES = [
    "galore_step",
    "ladder_step",
    "ledger_cost",
    "optimizer_step",
    "plan_accuracy",
    "plan_time",
    "trainer_overhead",
]


def test_every_folder_with_a_benchmark_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.names() == NAMES
    assert run.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    assert printed.count("goal:") == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_what_it_claims_and_how_it_measures(name: str) -> None:
    found = run._module(name)
    for word in ("Claim:", "How it is measured:", "Goal:"):
        assert word in found.__doc__
    assert found.CLAIM
    assert found.GOAL
    assert set(found.TINY) <= set(found.DEFAULTS)


def _run_all(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "all", "--tiny", "--output", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def results(made_once: Callable[[str, Callable[[Path], None]], Path]) -> dict[str, dict[str, Any]]:
    """The records of all of them, as a user runs them."""
    folder = made_once("benchmarks", _run_all)
    records = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    return {record["name"]: record for record in records}


def test_every_benchmark_writes_a_record(results: dict[str, dict[str, Any]]) -> None:
    assert sorted(results) == NAMES
    for name, found in results.items():
        check_record(found)
        assert found["conditions"]["configuration"].keys() == run._module(name).DEFAULTS.keys()


def test_the_trainers_train_the_same(results: dict[str, dict[str, Any]]) -> None:
    found = results["trainer_overhead"]
    assert found["summary"]["losses_equal"] is True
    assert "transformers, again" in found["summary"]["added_share_of_step"]
    configuration = found["conditions"]["configuration"]
    for repetition in found["repetitions"]:
        steps = repetition["processor_seconds"]["memrt"]
        # from the end of the last step of the warm-up on
        assert len(steps) == configuration["steps"] - configuration["warm_up"]
        assert all(seconds > 0 for seconds in steps)


def test_the_ledgers_cost_is_per_operator(results: dict[str, dict[str, Any]]) -> None:
    (found,) = results["ledger_cost"]["repetitions"]
    assert found["num_operators"] > 1000  # forward, backward and step of seven layers
    assert set(found["step_seconds"]) == {"plain", "mode", "ledger"}
    assert results["ledger_cost"]["summary"]["tiny"]["ratio"]["median"] > 1


def test_plans_of_every_layer_agree_with_the_quick_ones(results: dict[str, dict[str, Any]]) -> None:
    summary = results["plan_time"]["summary"]
    assert all(each["full_plan_is_equal"] for each in summary.values())
    simulated = {len(each["simulated_layers"]) for each in results["plan_time"]["repetitions"]}
    assert simulated == {1, 3}


def test_plan_ledger_and_profiler_agree(results: dict[str, dict[str, Any]]) -> None:
    found = results["plan_accuracy"]
    assert found["verdict"] == "met", found["verdict_reason"]
    assert found["summary"]["plan_equals_ledger"] == found["summary"]["rows"] == 2


def test_a_step_of_galore_is_charged_with_its_refreshes(results: dict[str, dict[str, Any]]) -> None:
    (rows,) = results["galore_step"]["summary"].values()
    assert rows["galore-torch"]["ratio_to_galore_torch"] == 1
    every = results["galore_step"]["conditions"]["configuration"]["every"]
    for name in ("memrt galore", "memrt galore, gradient formed", "galore-torch"):
        row = rows[name]
        later, first = row["later_whole_seconds"]["median"], row["first_whole_seconds"]
        assert row["amortised_whole_seconds"] == pytest.approx(later + (first - later) / every)
    base = rows["torch fused AdamW"]
    assert base["amortised_whole_seconds"] == base["later_whole_seconds"]["median"]


def test_whole_steps_are_timed_beside_those_of_others(results: dict[str, dict[str, Any]]) -> None:
    record = results["optimizer_step"]
    found = record["summary"]["whole steps"]
    assert set(found) == {f"1 layer of tiny, 16 tokens, {d}" for d in ("float32", "bfloat16")}
    names = {*whole_steps.FORMATS, *whole_steps.GALORE}
    for name, rows in found.items():
        assert {"torch fused", "bitsandbytes 8-bit", *names} <= set(rows)
        for row in rows.values():
            assert 0 < row["update_seconds"]["median"] < row["whole_seconds"]["median"]
        assert rows["torch fused"]["ratio_to_torch_fused"]["median"] == 1
        held = {label: row["state_bytes_per_parameter"] for label, row in rows.items()}
        assert held["memrt int4"] < min(held["memrt int8"], held["memrt fp8"]) < 3
        authors, ours = (held[label] for label in whole_steps.GALORE)
        # theirs are in the dtype of the gradient
        assert ours == pytest.approx(authors if "float32" in name else 2 * authors, rel=0.05)
    table = whole_steps.markdown(record)
    assert table.count("| memrt fp8 |") == len(found)
    old = {**record, "summary": record["summary"]["updates"]}
    assert "updates alone" in whole_steps.markdown(old)


def test_whole_steps_of_galore_are_charged_with_their_refreshes(
    results: dict[str, dict[str, Any]],
) -> None:
    measured = [each for each in results["optimizer_step"]["repetitions"] if "variants" in each]
    assert len(measured) == 2
    for each in measured:
        rows = whole_steps.summarise(each)
        for label, times in each["variants"].items():
            for index, kind in enumerate(("whole_seconds", "update_seconds")):
                expected = later = statistics.median(times[kind])
                if label in whole_steps.GALORE:
                    expected += (times["first_seconds"][index] - later) / each["every"]
                assert rows[label][kind]["median"] == pytest.approx(expected)


def test_a_ladder_keeps_less_than_checkpointing(results: dict[str, dict[str, Any]]) -> None:
    (rows,) = results["ladder_step"]["summary"].values()
    ours, base = rows["ladder, pooled, checkpointed"], rows["lora + checkpointing"]
    assert base["share_of_activations"] == base["ratio_of_steps"]["median"] == 1
    assert ours["share_of_activations"] < 0.5
    assert ours["activation_bytes"] < base["activation_bytes"] < rows["lora"]["activation_bytes"]


def test_tiny_results_do_not_go_where_results_are_committed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (["plan_time", "--tiny"], ["plan_time", "--tiny", "--output", str(RESULTS)]):
        with pytest.raises(SystemExit) as ended:
            run.main(arguments)
        assert ended.value.code == 2
        assert "name a folder with --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speed_of_light"], "benchmark 'speed_of_light' is unknown"),
        (["plan_time", "--set", "repetition=2"], "write name=value with one of"),
        (["plan_time", "--set", "repetitions"], "write name=value with one of"),
        (["plan_time", "--set", "repetitions=many"], "repetitions must be of type int"),
        (["plan_time", "--set", "repetitions=True"], "repetitions must be of type int"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_settings_take_the_place_of_defaults() -> None:
    chosen = run.chosen_options(
        run._module("plan_time"), tiny=True, settings=["repetitions=3", 'sizes=["70B"]']
    )
    assert chosen["repetitions"] == 3
    assert chosen["sizes"] == ["70B"]
    assert chosen["sequence_length"] == 16


def test_the_rise_in_a_trace_is_its_largest_sum() -> None:
    def change(time: float, num_bytes: int, *, device: int = 0) -> dict[str, Any]:
        arguments = {"Bytes": num_bytes, "Device Type": device}
        return {"name": "[memory]", "ts": time, "args": arguments}

    events = [change(3, -100), change(1, 100), change(2, 50), change(4, 20)]
    assert rise_in_trace([*events, change(2, 999, device=1), {"name": "aten::mm"}]) == 150


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.1B", 0.13), ("0.5B", 0.56), ("1B", 1.10), ("3B", 3.21), ("8B", 8.03), ("70B", 70.55)],
)
def test_shapes_have_the_parameters_that_their_names_say(size: str, billions: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config(size))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size='9B' is unknown"):
        llama_config("9B")
    assert "tiny" in SHAPES


def test_the_commands_of_the_page_run_modules_that_exist() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    modules = set(re.findall(r"python -m (benchmarks(?:\.\w+)+)", page))
    assert {"benchmarks.run", "benchmarks.render"} <= modules
    for module in modules:
        assert Path(ROOT, *module.split(".")).with_suffix(".py").exists(), module
    assert (ROOT / "benchmarks" / "gpu" / "run.sh").exists()


def test_committed_results_are_judged_by_the_goals_of_today() -> None:
    judges: dict[str, Any] = {
        **{name: import_module(f"benchmarks.{name}.benchmark") for name in run.names()},
        "quality": quality,
        "quality_speeds": speeds,
        "quality_why": why,
        "sst2": sst2_record,
    }
    found = [
        record for _, record in render.records(RESULTS) if not record["name"].startswith("gpu")
    ]
    assert {record["name"] for record in found} >= set(run.names())
    for record in found:
        judge = judges[record["name"]]
        assert (record["claim"], record["goal"]) == (judge.CLAIM, judge.GOAL), record["name"]
