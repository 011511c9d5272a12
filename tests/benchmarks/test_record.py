"""The form of committed results, and the page that is made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record as module
from benchmarks import render
from benchmarks.record import (
    RESULTS,
    ROOT,
    check_record,
    conditions,
    device_slug,
    make_record,
    spread,
    write_json,
    write_record,
)

OUTCOME: dict[str, Any] = {
    "repetitions": [{"seconds": 1.0}],
    "summary": {"seconds": spread([1.0])},
    "met": True,
    "reason": "1.00 s",
}


def a_record(**changes: Any) -> dict[str, Any]:
    found = {**conditions(configuration={"size": "tiny"}, device="cpu"), **changes}
    return make_record(name="some", claim="it is fast", goal="2 s", found=found, outcome=OUTCOME)


def test_a_record_has_its_conditions_and_passes_its_own_check() -> None:
    made = a_record()
    check_record(json.loads(json.dumps(made)))
    found = made["conditions"]
    assert found["device"] == "cpu"
    assert found["cores"] >= 1
    assert found["packages"]["torch"]
    assert found["configuration"] == {"size": "tiny"}
    assert "strategies" not in found
    assert made["verdict"] == "met"


@pytest.mark.parametrize(
    ("met", "verdict"), [(True, "met"), (False, "missed"), (None, "not judged")]
)
def test_verdicts(met: bool | None, verdict: str) -> None:
    made = make_record(
        name="some",
        claim="it is fast",
        goal="2 s",
        found=conditions(configuration={}, device="cpu"),
        outcome={**OUTCOME, "met": met},
    )
    assert made["verdict"] == verdict


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema", "memrt.report/1", "this reads"),
        ("claim", "", "claim='': must be a sentence"),
        ("verdict", "fine", "use one of met"),
        ("conditions", {"device": "cpu"}, "conditions lack cpu"),
        ("summary", {}, "summary is empty"),
        ("repetitions", [], "repetitions is empty"),
    ],
)
def test_what_is_no_record_is_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_record({**a_record(), key: value})


def test_the_commit_comes_from_the_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMRT_COMMIT", "abc123")
    found = conditions(configuration={}, device="cpu")
    assert (found["commit"], found["dirty"]) == ("abc123", None)
    monkeypatch.delenv("MEMRT_COMMIT")
    monkeypatch.setattr(module, "ROOT", Path("/"))
    found = conditions(configuration={}, device="cpu")
    assert (found["commit"], found["dirty"]) == ("unknown", None)


def test_spread() -> None:
    found = spread([3.0, 1.0, 2.0, 4.0, 100.0])
    assert (found["median"], found["min"], found["max"], found["count"]) == (3.0, 1.0, 100.0, 5)
    assert (found["lower_quartile"], found["upper_quartile"]) == (2.0, 4.0)
    assert spread([7.0])["upper_quartile"] == 7.0
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_a_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert json.loads(path.read_text("utf-8")) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["some.json"]


def test_numbers_that_json_does_not_have_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "some.json", {"a": [math.nan, math.inf], "b": (1, 2.5)})
    assert json.loads((tmp_path / "some.json").read_text("utf-8")) == {
        "a": ["nan", "inf"],
        "b": [1, 2.5],
    }


def test_the_file_name_tells_benchmark_and_machine(tmp_path: Path) -> None:
    on_cpu = a_record(cpu="AMD EPYC(tm) 7B13", cores=2)
    on_gpu = a_record(device="NVIDIA H200")
    assert write_record(on_cpu, tmp_path).name == "some-amd-epyc-tm-7b13-2-cores.json"
    assert write_record(on_gpu, tmp_path).name == "some-nvidia-h200.json"
    assert device_slug(on_gpu["conditions"]) == "nvidia-h200"


def test_the_page_shows_every_result_and_leaves_other_files(tmp_path: Path) -> None:
    page = "before\n<!-- table: results -->\nold\n<!-- end -->\nafter\n"
    assert render.NONE in render.fill(page, tmp_path)
    write_record(a_record(dirty=True, commit="abc"), tmp_path)
    write_json(tmp_path / "compare-x.json", {"schema": "memrt.report/1"})
    filled = render.fill(page, tmp_path)
    (row,) = [line for line in filled.splitlines() if "`some`" in line]
    assert "| **met** | 1.00 s |" in row
    assert "abc with uncommitted changes" in row
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert render.fill(filled, tmp_path) == filled


def test_the_committed_page_is_fresh() -> None:
    assert render.main(["--check"]) == 0


def test_committed_results_are_records() -> None:
    for name, found in render.records(RESULTS):
        assert name.startswith(f"{found['name']}-"), name
        parts = ROOT / "benchmarks"  # a folder of its own, or a command of quality's
        command = parts / "quality" / f"{found['name'].removeprefix('quality_')}.py"
        assert (parts / found["name"]).is_dir() or command.is_file(), name
