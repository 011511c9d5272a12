"""The memory report: three counted steps that change no number."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import memrt
from memrt.errors import NonFiniteLossError
from tests.contract import SPECS
from tests.trainer_runs import (
    assert_equal,
    examples,
    history,
    run,
    trainer_of,
    weights,
)
from tests.trainer_stubs import Poison

LISA = "lisa(layers=1, every=2)"


def test_the_memory_report_counts_three_steps_and_changes_none(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2}
    plain = run(tmp_path / "plain", **options)
    trainer = run(tmp_path / "counted", memory_report=True, **options)
    assert history(trainer) == history(plain)
    assert_equal(weights(trainer), weights(plain))
    assert trainer.session.ledger is None
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    hooks = [m for m in trainer.model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks
    report = json.loads((tmp_path / "counted/memrt/report.json").read_text())
    num_bytes = 4 * sum(p.numel() for p in trainer.model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in trainer.model.buffers())
    counts = 4 * len(list(trainer.model.parameters()))  # AdamW's step of each parameter
    assert report["accounts"]["weights"] == num_bytes + buffers
    assert report["accounts"]["optimizer"] == 2 * num_bytes + counts
    assert sum(report["accounts"].values()) == report["peak_bytes"] == report["places"]["device"]
    assert max(report["phases"].values()) == report["peak_bytes"]
    assert sum(report["owners"].values()) == report["peak_bytes"]
    assert 0 < len(report["top_allocations"]) <= 10
    assert report["num_counted_steps"] == 3
    assert report["conditions"]["strategies"] == []
    steps = [point["step"] for point in report["timeline"]]
    assert steps == sorted(steps)  # the update and clipping are of their step
    updates = {point["step"] for point in report["timeline"] if point["phase"] == "step"}
    assert updates == {0}  # where the state is made; the later ones allocate nothing


def test_the_monitor_watches_the_steps_after_the_counted_ones(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        memory_report=True,
        max_steps=6,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=5,
        eval_strategy="steps",
        eval_steps=4,
        options={"eval_dataset": examples("llama", count=4)},
    )
    report = json.loads((tmp_path / "memrt/report.json").read_text())
    phases = report["monitor"]["phases"]
    times = {name: phase["num_times"] for name, phase in phases.items()}
    assert times == {
        "counted": 3,
        "forward": 3 * 2,
        "backward": 3 * 2,
        "step": 3,
        "evaluate": 2,  # step 4, and the last
        "save": 2,  # step 5, and the last
    }
    assert all(phase["rss_peak_bytes"] > 2**20 for phase in phases.values())
    assert "threads" in report["conditions"]  # hardware and versions, as in every report
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [each["loss"] for each in report["losses"]] == logged
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert [each["loss"] for each in report["evaluation_losses"]] == evaluated
    page = (tmp_path / "memrt/report.md").read_text("utf-8")
    assert "NVML: not available: " in page
    assert "| peak" in page
    assert not [t for t in threading.enumerate() if t.name == "memrt-monitor"]


def test_several_evaluation_sets_are_one_evaluation(tmp_path: Path) -> None:
    """transformers evaluates each set from within the evaluation of all: no second counts twice."""
    spans: list[float] = []

    class Timed(memrt.Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                spans.append(time.perf_counter() - began)

    sets = {"one": examples("llama", count=4), "other": examples("llama", count=4)}
    evaluation = {"eval_strategy": "steps", "eval_steps": 4, "options": {"eval_dataset": sets}}
    run(tmp_path, cls=Timed, memory_report=True, max_steps=4, **evaluation)
    assert len(spans) == 3  # each of the two, and both
    phases = json.loads((tmp_path / "memrt/report.json").read_text())["monitor"]["phases"]
    assert phases["evaluate"]["num_times"] == 1
    assert phases["evaluate"]["seconds"] <= spans[-1]


def test_the_report_tells_tokens_per_second_of_the_steps_after_the_counted_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks once whenever it is read: a second for each step, and none beside."""
    ticks = iter(range(1000))
    monkeypatch.setattr("memrt.throughput.perf_counter", lambda: float(next(ticks)))
    seen: list[int] = []
    theirs = transformers.Trainer._prepare_inputs

    def prepare(self: Any, inputs: Any) -> Any:
        prepared = theirs(self, inputs)
        if self.model.training and self.state.global_step >= 3:
            mask = prepared.get("attention_mask")
            seen.append(prepared["input_ids"].numel() if mask is None else int(mask.sum()))
        return prepared

    monkeypatch.setattr(transformers.Trainer, "_prepare_inputs", prepare)
    options: dict[str, Any] = {"memory_report": True, "gradient_accumulation_steps": 2}
    held_out = {"eval_dataset": examples("llama", count=4)}
    run(tmp_path, max_steps=5, eval_strategy="steps", eval_steps=4, options=held_out, **options)
    report = json.loads((tmp_path / "memrt/report.json").read_text())
    assert len(seen) == 4  # two steps of two micro-batches
    assert report["tokens_per_second"] == sum(seen) / 2
    assert "- tokens/s: " in (tmp_path / "memrt/report.md").read_text("utf-8")
    run(tmp_path / "short", max_steps=3, **options)
    short = json.loads((tmp_path / "short/memrt/report.json").read_text())
    assert short["tokens_per_second"] is None


def test_resuming_is_a_phase_of_the_report(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    run(tmp_path, **options)
    run(
        tmp_path / "again",
        resume=str(tmp_path / "checkpoint-3"),
        memory_report=True,
        **options,
    )
    report = json.loads((tmp_path / "again/memrt/report.json").read_text())
    resumed = report["monitor"]["phases"]["resume"]
    assert resumed["num_times"] == 2  # weights, then the optimizer's state
    assert resumed["rss_peak_bytes"] > 2**20
    assert report["num_counted_steps"] == 3


def test_a_run_that_cannot_resume_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer_state\.json is missing; resume from"):
        run(tmp_path, resume=str(tmp_path), memory_report=True)
    assert not [t for t in threading.enumerate() if t.name == "memrt-monitor"]


def test_the_report_is_there_while_the_run_goes_on(tmp_path: Path) -> None:
    found: list[int] = []

    class Look(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            path = tmp_path / "memrt/report.json"
            found.append(json.loads(path.read_text())["steps"] if path.exists() else 0)

    trainer_of(tmp_path, memory_report=True, max_steps=5, options={"callbacks": [Look()]}).train()
    assert found == [0, 0, 0, 3, 3]
    assert json.loads((tmp_path / "memrt/report.json").read_text())["steps"] == 5


def test_a_folder_that_takes_no_report_costs_the_report_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "memrt").write_text("a file where the folder would be")
    trainer = run(tmp_path, memory_report=True, max_steps=4, save_strategy="no")
    assert trainer.state.global_step == 4
    assert f"the memory report was not written to {tmp_path / 'memrt'}" in caplog.text


def test_the_memory_report_shows_what_a_strategy_saves(tmp_path: Path) -> None:
    reports = {}
    for spec in (SPECS["galore"], LISA):
        run(tmp_path / spec, memory_report=True, strategies=[spec], max_steps=2)
        reports[spec] = json.loads((tmp_path / spec / "memrt/report.json").read_text())
        assert reports[spec]["num_counted_steps"] == 2  # ended before the third
    full = 2 * 4 * reports[LISA]["conditions"]["num_parameters"]
    assert all(report["accounts"]["optimizer"] < full for report in reports.values())


def test_counting_ends_with_an_exception(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, memory_report=True, options={"callbacks": [Poison(math.nan, 1)]})
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not [t for t in threading.enumerate() if t.name == "memrt-monitor"]


class _Exhausted(transformers.TrainerCallback):  # type: ignore[misc]
    """Runs out of memory where the first optimizer step begins, as often as it is told."""

    def __init__(self, num_times: int) -> None:
        self._num_times = num_times

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._num_times:
            self._num_times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def test_a_run_that_fails_in_its_first_step_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    path = tmp_path / "memrt/report.json"
    path.parent.mkdir()
    path.write_text("that of an earlier run")
    options: dict[str, Any] = {"callbacks": [_Exhausted(1)]}
    trainer = trainer_of(tmp_path, memory_report=True, options=options)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    report = json.loads(path.read_text())
    assert (report["num_counted_steps"], report["steps"], report["losses"]) == (0, 0, [])
    for account in ("weights", "gradients", "activations"):
        assert report["account_maxima"][account] > 0, account
    assert report["phases"]["backward"] > report["phases"]["load"] > 0
    page = (tmp_path / "memrt/report.md").read_text("utf-8")
    assert "in the first optimizer step, in which the run ended" in page
    trainer.train()  # another attempt counts
    assert json.loads(path.read_text())["num_counted_steps"] == 3


def test_a_smaller_batch_after_one_that_did_not_fit_is_counted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"callbacks": [_Exhausted(1)]}
    trainer_of(tmp_path, memory_report=True, auto_find_batch_size=True, options=options).train()
    report = json.loads((tmp_path / "memrt/report.json").read_text())
    assert report["num_counted_steps"] == 3
    assert report["conditions"]["batch_size"] == 1
