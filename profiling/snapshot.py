"""torch's own record of the CUDA allocator, as a file that PyTorch's memory viewer opens.

The allocator's history (every allocation and free, with the Python stack) is recorded while a few
steps run, and saved as ``snapshot.pickle``: drop it on pytorch.org/memory_viz. Blocks that were
allocated before carry no stack. Recording costs about 2 µs for each allocation and free, and on the
host a few hundred bytes for each of the last ``max_entries``; nothing once it has stopped.

A script that records the history itself is left alone. Without CUDA there is no such allocator, and
``unavailable`` says so.

Source: docs.pytorch.org/docs/stable/torch_cuda_memory.html.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from memrt.profiling.whole_file import write_whole

__all__ = ["OOM_FOLDER", "SNAPSHOT_NAME", "VIEWER", "AllocatorHistory", "write_snapshot"]

SNAPSHOT_NAME = "snapshot.pickle"
OOM_FOLDER = "oom"
VIEWER = "https://pytorch.org/memory_viz"

_MAX_ENTRIES = 100_000


class AllocatorHistory:
    """The history of one device's allocator, recorded once: start, stop, write.

    `unavailable` is a reason of the caller's for which there is nothing to record.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_entries: int = _MAX_ENTRIES,
        unavailable: str | None = None,
    ) -> None:
        self.unavailable = unavailable
        self.on_cuda = device.type == "cuda"
        if not self.on_cuda:
            self.unavailable = (
                f"the run is on {device.type!r}, and PyTorch's memory viewer shows the CUDA "
                "allocator alone"
            )
        self._max_entries = max_entries
        self._records = False
        self._pickled: bytes | None = None
        self._written = False

    def __enter__(self) -> AllocatorHistory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Record from now on."""
        if self.unavailable is not None or self._records:
            return
        if _is_recorded():
            self.unavailable = "the script records the allocator's history itself"
            return
        torch.cuda.memory._record_memory_history(
            enabled="all", context="all", stacks="python", max_entries=self._max_entries
        )
        self._records, self._pickled, self._written = True, None, False

    def stop(self) -> None:
        """Keep what was recorded, and record no more."""
        if not self._records:
            return
        self._records = False
        try:
            self._pickled = _pickled_snapshot()
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def write(self, folder: Path) -> None:
        """Save what was recorded as ``snapshot.pickle``; nothing where it is saved already."""
        if self._pickled is None:
            return
        write_whole(folder / SNAPSHOT_NAME, self._pickled)
        self._pickled, self._written = None, True

    def to_json(self) -> dict[str, Any]:
        """The file's name beside the report, or why there is none."""
        if self._written or self._pickled is not None:
            return {"file": SNAPSHOT_NAME, "reason": None}
        return {"file": None, "reason": self.unavailable or "no step was recorded"}

    def __str__(self) -> str:
        found = self.to_json()
        return str(found["file"] or f"not available: {found['reason']}")


def write_snapshot(folder: Path, *, rank: int = 0) -> Path:
    """Save what CUDA's allocator holds now, as when it has run out of memory."""
    path = folder / OOM_FOLDER / f"rank{rank}_oom_snapshot.pickle"
    write_whole(path, _pickled_snapshot())
    return path


def _pickled_snapshot() -> bytes:
    return pickle.dumps(torch.cuda.memory._snapshot())


def _is_recorded() -> bool:
    """Whether somebody records the history already."""
    asked = getattr(torch._C, "_cuda_isHistoryEnabled", None)  # a build without CUDA has no such
    return asked is not None and bool(asked())
