"""The stock transformers Trainer with memrt's profiler as a callback."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import memrt
from tests.trainer_runs import assert_equal, history, run, trainer_of, weights

STOCK: dict[str, Any] = {
    "cls": transformers.Trainer,
    "arguments_cls": transformers.TrainingArguments,
    "gradient_accumulation_steps": 2,
}


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return found


def _is_over() -> bool:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return not modes and not [t for t in threading.enumerate() if t.name == "memrt-monitor"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_callback_counts_what_memrts_trainer_counts(tmp_path: Path, family: str) -> None:
    run(tmp_path / "ours", family=family, memory_report=True, gradient_accumulation_steps=2)
    callback = memrt.MemoryProfilerCallback()
    trainer = run(tmp_path / "stock", family=family, options={"callbacks": [callback]}, **STOCK)
    ours, stock = (_report(tmp_path / name / "memrt") for name in ("ours", "stock"))
    for key in ("peak_bytes", "accounts", "account_maxima", "num_counted_steps"):
        assert stock[key] == ours[key], key
    # clipping lies between the last backward and the first event that a callback is told of
    clipped = ours["phases"].pop("other")
    assert stock["phases"] == ours["phases"]
    assert clipped <= ours["peak_bytes"]
    assert stock["steps"] == trainer.state.global_step == 6
    phases = {name: each["num_times"] for name, each in stock["monitor"]["phases"].items()}
    assert phases == {"counted": 3, "forward and backward": 3, "step": 3}
    assert (tmp_path / "stock/memrt/report.md").is_file()
    assert _is_over()


def test_the_callback_changes_no_number(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", **STOCK)
    callback = memrt.MemoryProfilerCallback(folder=tmp_path / "elsewhere")
    watched = run(tmp_path / "watched", options={"callbacks": [callback]}, **STOCK)
    assert history(watched) == history(plain)
    assert_equal(weights(watched), weights(plain))
    assert _report(tmp_path / "elsewhere")["output"] == str(tmp_path / "watched")
    assert not (tmp_path / "watched/memrt").exists()


class _Fails(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise ArithmeticError("the user's own")


def test_after_an_exception_it_closes_when_told_and_when_training_begins_again(
    tmp_path: Path,
) -> None:
    callback = memrt.MemoryProfilerCallback()
    # it comes first, so that its second step is open when the other fails
    trainer = trainer_of(tmp_path, options={"callbacks": [_Fails(), callback]}, **STOCK)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            trainer.train()
        assert not _is_over()
    callback.close()
    assert _is_over()
    trainer.remove_callback(_Fails)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert _report(tmp_path / "memrt")["num_counted_steps"] == 3
    assert _is_over()


def test_a_trainer_that_counts_itself_is_told_so(tmp_path: Path) -> None:
    """Beside strategies it would report none, and a second report would go to the same folder."""
    ours: list[dict[str, Any]] = [
        {"memory_report": True},
        {"strategies": ["lisa(layers=1)"]},
        {"arguments_cls": transformers.TrainingArguments, "options": {"strategies": ["lisa"]}},
        {"arguments_cls": transformers.TrainingArguments, "options": {"memory_report": True}},
    ]
    for number, settings in enumerate(ours):
        callbacks = [memrt.MemoryProfilerCallback()]
        options = {**settings.pop("options", {}), "callbacks": callbacks}
        trainer = trainer_of(tmp_path / str(number), options=options, **settings)
        with pytest.raises(ValueError, match="set memory_report=True and leave the callback out"):
            trainer.train()
        assert _is_over()
    plain = trainer_of(tmp_path / "plain", options={"callbacks": [memrt.MemoryProfilerCallback()]})
    plain.train()  # memrt's own without either is a stock Trainer
    assert _report(tmp_path / "plain/memrt")["num_counted_steps"] == 3
