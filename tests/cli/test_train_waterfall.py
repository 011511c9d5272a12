"""The waterfall in the report of `memrt train`: what every strategy was planned to save."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command
from tests.cli.train_runs import SHORT, write_model, write_text

RUN = ("model=model", "data=sums.txt", *SHORT, "--steps", 1, "save_strategy=no")
STACK = ("activation_checkpoint", "int8_states")


@pytest.fixture(autouse=True)
def files(memrt: Command) -> None:
    """A model and data in the working folder."""
    write_model(Path("model"))
    write_text(Path("sums.txt"))


def _report(memrt: Command, *words: object) -> tuple[dict[str, Any], str]:
    result = memrt("train", *RUN, *words)
    assert result.code == 0, result.err
    return json.loads(Path("memrt-run/memrt/report.json").read_text())["predicted"], result.err


def test_the_report_of_a_run_tells_what_every_strategy_saves(memrt: Command) -> None:
    predicted, told = _report(memrt, "--strategies", *STACK)
    rows = predicted["waterfall"]
    assert [row["strategy"] for row in rows] == ["none", "int8_states", "activation_checkpoint"]
    assert rows[-1]["peak_bytes"] == predicted["peak_bytes"]
    assert [row["peak_bytes"] for row in rows[1:]] == [
        before["peak_bytes"] - row["step_bytes"] for before, row in pairwise(rows)
    ]
    assert rows[1]["step_bytes"] > 0
    assert predicted["waterfall_left_out"] is None
    assert "planning what every strategy saves (3 more plans)" in told
    for page in ("report.md", "report.html"):
        assert "What every strategy saves" in Path("memrt-run/memrt", page).read_text()
    # the same numbers as those of the command that is about plans alone: packed, so that all
    # batches are of this shape
    words = ("--model", "model", "--batch", 2, "--seq", 24, "--dtype", "float32")
    planned = memrt("plan", *words, "--waterfall", "--json", "--strategies", *STACK)
    assert planned.report["waterfall"] == rows


def test_a_model_whose_own_code_is_trusted_is_planned_without_strategies_too(
    memrt: Command,
) -> None:
    predicted, _ = _report(memrt, "--strategies", "int8_states", "--trust-remote-code", "true")
    none, whole = predicted["waterfall"]
    assert none["peak_bytes"] > whole["peak_bytes"] == predicted["peak_bytes"]
    assert whole["step_bytes"] == whole["saved_bytes"] > 0


def test_a_run_does_not_wait_long_for_its_waterfall(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memrt.cli.train_plan._MAX_WATERFALL_SECONDS", 0.0)
    predicted, told = _report(memrt, "--strategies", *STACK)
    assert predicted["waterfall"] is None
    assert "3 more plans of about" in predicted["waterfall_left_out"]
    assert "planning what every strategy saves" not in told
    page = Path("memrt-run/memrt/report.md").read_text()
    assert "Not planned: 3 more plans of about" in page


def test_it_is_planned_only_for_a_report_that_shows_it(memrt: Command) -> None:
    predicted, told = _report(memrt, "--strategies", *STACK, "memory_report=false")
    assert predicted["waterfall"] is predicted["waterfall_left_out"] is None
    assert "planning what every strategy saves" not in told
