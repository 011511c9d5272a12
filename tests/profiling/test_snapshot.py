"""The allocator's history: recorded once, saved whole, left alone where a script has its own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from memrt.profiling import snapshot
from memrt.profiling.snapshot import AllocatorHistory, write_snapshot

CUDA = torch.device("cuda")


class Recorder:
    """Stands in for torch.cuda.memory: what it was told, and a snapshot of that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self._record)
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", self._snapshot)
        monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: False, raising=False)

    @property
    def records(self) -> bool:
        return bool(self.calls) and self.calls[-1]["enabled"] is not None

    def _record(self, **options: Any) -> None:
        self.calls.append(options)

    def _snapshot(self) -> dict[str, Any]:
        return {"segments": [], "device_traces": [[{"action": "alloc"}]], "while": self.records}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def test_a_cpu_has_none_and_says_why(recorder: Recorder, tmp_path: Path) -> None:
    history = AllocatorHistory(torch.device("cpu"))
    history.start()
    history.stop()
    history.write(tmp_path)
    assert not recorder.calls
    assert not list(tmp_path.iterdir())
    reason = "the run is on 'cpu', and PyTorch's memory viewer shows the CUDA allocator alone"
    assert history.to_json() == {"file": None, "reason": reason}
    assert str(history) == f"not available: {reason}"


def test_what_was_recorded_is_taken_before_recording_ends(
    recorder: Recorder, tmp_path: Path
) -> None:
    history = AllocatorHistory(CUDA, max_entries=7)
    assert history.to_json() == {"file": None, "reason": "no step was recorded"}
    history.start()
    history.start()
    assert [call["enabled"] for call in recorder.calls] == ["all"]
    assert recorder.calls[0]["max_entries"] == 7
    history.stop()
    history.stop()
    assert [call["enabled"] for call in recorder.calls] == ["all", None]
    history.write(tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "snapshot.pickle"
    assert pickle.loads(path.read_bytes())["while"] is True
    assert history.to_json() == {"file": "snapshot.pickle", "reason": None}
    path.write_bytes(b"kept")
    history.write(tmp_path / "new")  # written once
    assert path.read_bytes() == b"kept"


def test_recording_ends_also_where_the_snapshot_fails(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("no snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_snapshot", fails)
    history = AllocatorHistory(CUDA)
    history.start()
    with pytest.raises(RuntimeError, match="no snapshot"):
        history.stop()
    assert not recorder.records


def test_a_script_that_records_itself_is_left_alone(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: True, raising=False)
    history = AllocatorHistory(CUDA)
    history.start()
    history.stop()
    history.write(tmp_path)
    assert not recorder.calls
    assert history.to_json()["reason"] == "the script records the allocator's history itself"


def test_a_file_is_whole_or_not_there(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_snapshot(tmp_path, rank=3)
    assert path == tmp_path / "oom/rank3_oom_snapshot.pickle"
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(tmp_path, rank=3)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_allocator_s_history_has_our_allocation_with_its_stack(tmp_path: Path) -> None:
    size = 48 * 2**20
    history = AllocatorHistory(CUDA)
    history.start()
    held = torch.empty(size, dtype=torch.uint8, device="cuda")
    history.stop()
    after = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
    history.write(tmp_path)
    found = pickle.loads((tmp_path / "snapshot.pickle").read_bytes())
    traces = [entry for trace in found["device_traces"] for entry in trace]
    (entry,) = [e for e in traces if e["action"] == "alloc" and e["size"] == size]
    assert any(frame["filename"] == __file__ for frame in entry["frames"])
    assert not [e for e in traces if e["size"] == 2 * size]
    del held, after
