"""The table of losses, from a record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import run, speeds, why
from benchmarks.quality.methods import METHODS
from benchmarks.quality.table import markdown


def row_of(method: str, loss: float, above: float | None) -> dict[str, Any]:
    return {
        "task": "gsm8k",
        "method": method,
        "evaluation_loss": loss,
        "above_adamw": above,
        "learning_rate": 1e-3,
        "proxy_losses": {"0.0003": 5.25, "0.001": 4.125, "0.003": None},
        "peak_bytes": 3 << 20,
        "account_maxima": {"weights": 2 << 20, "activations": 1 << 20},
    }


def record_of(cpu: str, base: dict[str, float], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "conditions": {"cpu": cpu, "configuration": {"steps": 150, "proxy_steps": 40}},
        "summary": {"base_evaluation_loss": base, "rows": rows},
    }


def test_every_task_has_one_table_of_all_bases_that_says_what_is_missing() -> None:
    most = list(METHODS)[:-2]
    one = record_of(
        "a processor",
        {"gsm8k": 8.5, "wikitext2": 4.75},
        [
            *(row_of(name, 4.25 if name == "galore" else 4.0, 0.25) for name in most),
            {**row_of("adamw", 4.0, 0.0), "task": "wikitext2"},
        ],
    )
    late = list(METHODS)[-2]
    other = record_of(
        "another", {"gsm8k": 8.25}, [row_of(late, 3.75, -0.25), row_of("adamw", 4.0, 0.0)]
    )
    first, second = markdown([one, other]).split("**wikitext2**")
    assert "150 steps after 40" in first
    assert "base A, 8.500 itself (trained and continued on a processor)" in first
    assert "base B, 8.250 itself (trained and continued on another)" in first
    cells = [line.split(" | ") for line in first.splitlines() if line.startswith("| galore |")]
    rate = "0.001 (0.0003: 5.250, 0.001: 4.125, 0.003: none)"
    assert cells == [
        ["| galore", "A", "4.250", "+0.250", rate, *("3", "2", "0", "0", "1", "0 |")],
    ]
    assert f"| {late} | B | 3.750 | -0.250 |" in first
    baselines = [line[:14] for line in first.splitlines() if line.startswith("| adamw |")]
    assert baselines == ["| adamw | A | ", "| adamw | B | "]
    assert first.strip().endswith(f"Not in this result: {list(METHODS)[-1]}.")
    assert "base A, 4.750" in second
    assert "base B" not in second


def test_speeds_are_beside_adamws_of_the_same_round() -> None:
    repetitions = [
        {"task": "gsm8k", "round": number, "method": method, "tokens_per_second": speed}
        for number, method, speed in (
            *((0, "adamw", 1000.0), (0, "lora", 1500.0)),
            *((1, "adamw", 500.0), (1, "lora", 1000.0)),  # something else computed
        )
    ]
    outcome = speeds._outcome(repetitions)
    words = ("gsm8k: AdamW 750 tokens/s", "the fastest lora 1.75 ×", "the slowest adamw 1.00 ×")
    assert outcome["reason"] == ", ".join(words)
    record = {"conditions": {"cpu": "a processor", "cores": 2}, "summary": outcome["summary"]}
    assert speeds.markdown(record).endswith("| adamw | 750 (1.00) |\n| lora | 1,250 (1.75) |")


def test_a_changed_method_is_the_method_with_one_thing_changed() -> None:
    for variant in why.VARIANTS:
        method = METHODS[variant.method]
        usual = variant.learning_rate in method.learning_rates or method.rate_of is not None
        changes = [bool(variant.strategies), variant.steps != 150, not usual]
        assert sum(changes) == bool(variant.change), variant
        if variant.change:  # the method itself is beside it
            assert why.Variant(method=variant.method, learning_rate=_rate(variant)) in why.VARIANTS


def _rate(variant: why.Variant) -> float:
    own = [each for each in why.VARIANTS if each.method == variant.method and not each.change]
    return own[0].learning_rate


def test_changed_methods_are_told_beside_adamw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, tuple[str, ...], float, int]] = []

    def train_once(run: Path, **values: Any) -> dict[str, Any]:
        made.append((run.name, values["method"].strategies, values["lr"], values["steps"]))
        maxima = {"weights": 1 << 20}
        loss = 3.0 if not values["method"].strategies else 3.25
        return {
            "evaluation_loss": loss,
            "loss": loss,
            "peak_bytes": 2 << 20,
            "account_maxima": maxima,
        }

    monkeypatch.setattr(why, "train_once", train_once)
    rows = [why._run(each, folder=tmp_path, data=tmp_path) for each in why.VARIANTS]
    assert len({name for name, *_ in made}) == len(made)  # a folder each
    assert (
        "gsm8k-lisa_layers_4__every_10_-0.003-150",
        ("lisa(layers=4, every=10)",),
        3e-3,
        150,
    ) in made
    table = why.markdown({"summary": why._outcome(rows)["summary"]})
    assert "| adamw |  | 150 | 0.001 | 3.000 | +0.000 | 2 |" in table
    assert "| lisa | twice the steps | 300 | 0.003 | 3.250 | +0.250 | 2 |" in table


def test_a_sentence_of_a_task_names_the_lowest_and_the_highest() -> None:
    rows = [
        {"task": "gsm8k", "method": method, "evaluation_loss": loss}
        for method, loss in (("adamw", 3.0), ("apollo", 2.5), ("badam", 4.0))
    ]
    outcome = run._outcome(rows, {"gsm8k": 8.0, "wikitext2": 4.75})
    assert outcome["reason"] == (
        "gsm8k: held-out loss of the base 8.000, AdamW 3.000, the lowest apollo 2.500, "
        "the highest badam 4.000; wikitext2: held-out loss of the base 4.750"
    )
    assert [row["above_adamw"] for row in outcome["summary"]["rows"]] == [0.0, -0.5, 1.0]
