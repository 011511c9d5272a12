"""The memory report: three counted steps that change no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from memrt.errors import NonFiniteLossError
from tests.contract import SPECS
from tests.trainer_runs import (
    assert_equal,
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
    assert report["conditions"]["num_steps"] == 3
    assert report["conditions"]["strategies"] == []


def test_the_memory_report_shows_what_a_strategy_saves(tmp_path: Path) -> None:
    reports = {}
    for spec in (SPECS["galore"], LISA):
        run(tmp_path / spec, memory_report=True, strategies=[spec], max_steps=2)
        reports[spec] = json.loads((tmp_path / spec / "memrt/report.json").read_text())
        assert reports[spec]["conditions"]["num_steps"] == 2  # ended before the third
    full = 2 * 4 * reports[LISA]["conditions"]["num_parameters"]
    assert all(report["accounts"]["optimizer"] < full for report in reports.values())


def test_counting_ends_with_an_exception(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, memory_report=True, options={"callbacks": [Poison(math.nan, 1)]})
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
