"""`snapshot.pickle` of a Trainer's counted steps, and of running out of memory."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import memrt
from memrt import MemoryProfilerCallback, memory_report
from memrt.profiling.snapshot import AllocatorHistory
from tests.trainer_runs import arguments, examples, model_of, run, trainer_of

CPU = "the run is on 'cpu', and PyTorch's memory viewer shows the CUDA allocator alone"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As on CUDA, with torch's functions standing in: what was asked of them."""
    calls: list[Any] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **o: calls.append(o["enabled"])
    )
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"calls": list(calls)})
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: False, raising=False)
    on_cuda = AllocatorHistory(torch.device("cuda"))
    monkeypatch.setattr(memory_report, "AllocatorHistory", lambda device: on_cuda)
    return calls


class Failing(transformers.TrainerCallback):  # type: ignore[misc]
    """Runs out of memory in an optimizer step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise torch.OutOfMemoryError("CUDA out of memory")


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "memrt/report.json").read_text())
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_on_the_cpu_the_report_says_why_there_is_none(tmp_path: Path) -> None:
    run(tmp_path, memory_report=True, max_steps=4)
    assert report_of(tmp_path)["snapshot"] == {"file": None, "reason": CPU}
    assert f"allocator snapshot: not available: {CPU}" in (
        (tmp_path / "memrt/report.md").read_text("utf-8")
    )
    assert not list(tmp_path.rglob("*.pickle"))


@pytest.mark.parametrize("max_steps", [2, 5])
def test_the_counted_steps_are_recorded_and_no_more(
    max_steps: int, recorded: list[Any], tmp_path: Path
) -> None:
    seen = []

    class Look(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(list(recorded))

    run(tmp_path, memory_report=True, max_steps=max_steps, options={"callbacks": [Look()]})
    assert seen == [["all"]] * min(max_steps, 3) + [["all", None]] * max(0, max_steps - 3)
    assert recorded == ["all", None]
    assert pickle.loads((tmp_path / "memrt/snapshot.pickle").read_bytes()) == {"calls": ["all"]}
    assert report_of(tmp_path)["snapshot"] == {"file": "snapshot.pickle", "reason": None}


def test_a_model_that_is_made_anew_leaves_nothing_of_the_first_behind(
    recorded: list[Any], tmp_path: Path
) -> None:
    trainer = memrt.Trainer(
        model_init=lambda: model_of("llama"),
        args=arguments(tmp_path, memory_report=True, max_steps=4),
        train_dataset=examples("llama"),
    )
    trainer.train()
    assert recorded == ["all", None, "all", None]
    assert (tmp_path / "memrt/snapshot.pickle").exists()
    assert not [t for t in threading.enumerate() if t.name == "memrt-monitor"]


def test_the_callback_of_the_stock_trainer_has_it_too(recorded: list[Any], tmp_path: Path) -> None:
    options = {"callbacks": [MemoryProfilerCallback()]}
    stock = {"cls": transformers.Trainer, "arguments_cls": transformers.TrainingArguments}
    run(tmp_path, options=options, **stock)
    assert recorded == ["all", None]
    assert (tmp_path / "memrt/snapshot.pickle").exists()


@pytest.mark.parametrize("step", [1, 4])
def test_running_out_of_memory_leaves_a_snapshot(
    step: int, recorded: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, memory_report=True, options={"callbacks": [Failing(step)]})
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    path = tmp_path / "memrt/oom/rank0_oom_snapshot.pickle"
    # in a counted step the history is in it
    expected = ["all"] if step < 3 else ["all", None]
    assert pickle.loads(path.read_bytes()) == {"calls": expected}
    assert f"out of memory: {path} has what the allocator held" in caplog.text
    assert recorded == ["all", None]


def test_without_a_report_nothing_is_recorded(recorded: list[Any], tmp_path: Path) -> None:
    options = {"callbacks": [Failing(1)]}
    trainer = trainer_of(tmp_path, strategies=["lisa(layers=1)"], options=options)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert not recorded
    assert not list(tmp_path.rglob("*.pickle"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_run_on_cuda_has_a_snapshot_of_its_steps(tmp_path: Path) -> None:
    run(tmp_path, memory_report=True, max_steps=4, use_cpu=False)
    found = pickle.loads((tmp_path / "memrt/snapshot.pickle").read_bytes())
    traces = [entry for trace in found["device_traces"] for entry in trace]
    assert {"alloc", "free_completed"} <= {entry["action"] for entry in traces}
    assert found["segments"]
