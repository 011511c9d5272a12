"""`memrt compare`: one table of stacks that start alike, and every claim in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memrt.cli.compare import DEFAULT_STACKS
from tests.cli.claims import Llama, claims, saved
from tests.cli.conftest import SHAPES, Command

RUN = [*SHAPES, "--steps", "4"]
TINY_STACKS = [
    stack.replace("rank=64", "rank=16").replace("fused_loss", "fused_loss(chunk_tokens=16)")
    for stack in DEFAULT_STACKS
]


def check_claims(report: dict[str, Any], model: Llama, **options: int) -> None:
    runs = {run["stack"]: run for run in report["runs"]}
    none = runs.pop("none")
    for stack, run in runs.items():
        expected = claims(stack, model, **options)
        if stack == "offload_activations":
            # one saved tensor at a time stays: the log-softmax is the largest
            largest = model.tokens * model.vocabulary * 4
            expected["activations"] = none["account_maxima"]["activations"] - largest
        assert expected, f"{stack} claims nothing"
        for account, num_bytes in expected.items():
            found = saved(run, none, account)
            assert found >= 0.8 * num_bytes, f"{stack}, {account}: {found} of {num_bytes:.0f}"
        assert run["peak_bytes"] < none["peak_bytes"], stack


def test_every_strategy_lowers_the_account_that_it_claims(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    model = Llama(hidden=64, intermediate=192, layers=4, vocabulary=2048, tokens=128)
    result = memrt(
        "compare", "--model", model_folder(), *RUN, "--json", "--strategies", *TINY_STACKS
    )
    assert result.code == 0, result.err
    check_claims(result.report, model, rank=16, chunk=16, active=2)


@pytest.mark.slow
def test_the_default_table_keeps_its_claims(memrt: Command) -> None:
    result = memrt("compare")
    assert result.code == 0, result.err
    report = json.loads(Path("memrt-report/report.json").read_text())
    conditions = report["conditions"]
    assert len(report["runs"]) >= 6
    assert conditions["num_parameters"] >= 8_000_000
    assert conditions["sequence_length"] >= 256
    model = Llama(hidden=256, intermediate=768, layers=8, vocabulary=4096, tokens=4 * 256)
    check_claims(report, model, rank=64, chunk=256, active=2)
    for run in report["runs"]:
        assert run["loss"] < run["losses"][0], run["stack"]


def test_every_stack_starts_from_the_same_weights_and_batches(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    stacks = ["none", "activation_checkpoint", "offload_activations", "lisa", "int8_states"]
    result = memrt("compare", "--model", model_folder(), *RUN, "--json", "--strategies", *stacks)
    runs = {run["stack"]: run for run in result.report["runs"]}
    assert len({run["losses"][0] for run in runs.values()}) == 1
    assert abs(runs["none"]["losses"][0] - math.log(2048)) < 0.2  # untrained: uniform
    for exact in ("activation_checkpoint", "offload_activations"):
        assert runs[exact]["losses"] == runs["none"]["losses"]
        assert runs[exact]["evaluation_loss"] == runs["none"]["evaluation_loss"]
    assert runs["lisa"]["losses"][-1] != runs["none"]["losses"][-1]


def test_the_same_command_gives_the_same_numbers_but_for_time(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = [
        "compare",
        "--model",
        model_folder(),
        *RUN,
        "--json",
        "--strategies",
        "galore(rank=16)",
    ]
    first, second = (memrt(*words).report["runs"][0] for _ in range(2))
    for name in ("losses", "gradient_norms", "evaluation_loss", "peak_bytes", "accounts", "owners"):
        assert first[name] == second[name], name
    other = memrt(*words, "--seed", "7").report["runs"][0]
    assert other["losses"] != first["losses"]


def test_the_report_of_a_run_has_the_whole_schema(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    result = memrt("compare", "--model", model_folder(), *RUN, "--strategies", "none", "lisa")
    report = json.loads(Path("memrt-report/report.json").read_text())
    assert report["schema"] == "memrt.report/1"
    assert [run["stack"] for run in report["runs"]] == ["none", "lisa"]
    for run in report["runs"]:
        assert sum(run["accounts"].values()) == run["peak_bytes"]
        assert sum(run["owners"].values()) == run["peak_bytes"]
        assert run["tokens_per_second"] > 0
        assert run["loss"] == pytest.approx(sum(run["losses"][-3:]) / 3)
        assert len(run["losses"]) == 4
        assert len(run["step_seconds"]) == 1
        assert run["conditions"]["packages"]["torch"]
    markdown = Path("memrt-report/report.md").read_text()
    assert "| none " in result.out
    assert "| none " in markdown
    assert "At the instant of the peak" in markdown
    assert "num parameters" in markdown


def test_a_stack_that_cannot_run_is_a_row_and_the_others_go_on(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    stacks = ["none", "lisa(layers=9)", "int8_states"]
    result = memrt("compare", "--model", model_folder(), *RUN, "--json", "--strategies", *stacks)
    assert result.code == 1
    runs = {run["stack"]: run for run in result.report["runs"]}
    assert [run["status"] for run in runs.values()] == ["ok", "refused", "ok"]
    refused = runs["lisa(layers=9)"]
    assert "layers=9 is more than the 4 layers" in refused["reason"]
    assert refused["peak_bytes"] is None
    assert set(refused) <= set(runs["none"])
    # told before the first run starts
    assert result.err.index("lisa(layers=9): refused") < result.err.index("none: 4 steps")
    assert "- lisa(layers=9): refused: " in Path("memrt-report/report.md").read_text()


def test_a_run_that_fails_is_a_row_and_the_others_go_on(
    memrt: Command, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from memrt import measure

    train_step = measure.train_step

    def exhausted(run: Any, *args: Any) -> None:
        if run.session.strategies and run.session.step_index == 2:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        train_step(run, *args)

    monkeypatch.setattr(measure, "train_step", exhausted)
    words = ["compare", "--model", model_folder(), *RUN, "--json", "--strategies", "lisa", "none"]
    result = memrt(*words)
    assert result.code == 1
    failed, done = result.report["runs"]
    assert (failed["status"], done["status"]) == ("failed", "ok")
    assert "out of memory on cpu: tried to allocate 20 GiB" in failed["reason"]


def test_interrupting_keeps_what_is_measured(
    memrt: Command, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memrt import measure

    train_step = measure.train_step

    def interrupted(run: Any, *args: Any) -> None:
        if run.session.strategies:
            raise KeyboardInterrupt
        train_step(run, *args)

    monkeypatch.setattr(measure, "train_step", interrupted)
    words = ["compare", "--model", model_folder(), *RUN, "--strategies", "none", "lisa", "galore"]
    result = memrt(*words)
    assert result.code == 130
    assert result.error == "memrt compare: interrupted"
    report = json.loads(Path("memrt-report/report.json").read_text())
    assert [run["status"] for run in report["runs"]] == ["ok", "interrupted", "interrupted"]


def test_a_gpu_adds_whether_each_stack_fits(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["compare", "--model", model_folder(), *RUN, "--strategies", "none", "--gpu"]
    result = memrt(*words, "733MiB")  # 732 MiB are context and cuBLAS alone, at most
    assert "fits 733MiB" in result.out
    assert json.loads(Path("memrt-report/report.json").read_text())["runs"][0]["fits"] is False
    assert memrt(*words, "1GiB", "--json").report["runs"][0]["fits"] is True
