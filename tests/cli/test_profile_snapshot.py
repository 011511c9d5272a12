"""`snapshot.pickle` beside the report of `memrt profile`."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memrt.profiling import snapshot
from tests.cli.conftest import SHAPES, Command

WORDS = ["profile", *SHAPES, "--steps", "4"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_on_the_cpu_the_report_says_why_there_is_none(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    folder = model_folder()
    found = memrt(*WORDS, "--model", folder, "--output", "report", "--json").report["snapshot"]
    assert found["file"] is None
    assert found["reason"].startswith("the run is on 'cpu'")
    assert not list(Path("report").glob("*.pickle"))


def test_the_steps_under_the_ledger_are_in_it(
    memrt: Command, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **o: calls.append(o["enabled"])
    )
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"calls": list(calls)})
    original = snapshot.AllocatorHistory
    on_cuda = functools.partial(original, torch.device("cuda"))
    monkeypatch.setattr(snapshot, "AllocatorHistory", lambda device, **o: on_cuda(**o))
    folder = model_folder()
    report = memrt(*WORDS, "--model", folder, "--json").report
    assert report["snapshot"] == {"file": None, "reason": "no folder was named with --output"}
    assert not calls
    report = memrt(*WORDS, "--model", folder, "--output", "report", "--json").report
    assert report["snapshot"] == {"file": "snapshot.pickle", "reason": None}
    assert pickle.loads(Path("report/snapshot.pickle").read_bytes()) == {"calls": ["all"]}
    assert calls == ["all", None]
