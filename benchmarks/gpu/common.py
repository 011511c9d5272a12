"""What the parts of the GPU suite share: the device, the scale, and a file of rows that survives.

A part is a process that fills one JSON, row by row. Before a case begins its name is written as
`running`, after it the row; a process that dies leaves the rows before, and the one that is started
in its place finds the case that killed it and goes on with the next. Errors that leave the device
usable become a row; those that do not (CUDA errors are sticky) end the process, and so does a case
that takes longer than it may. A part whose cases run in several processes at once has a file for
each, `correctness-llama.json`, which `benchmarks.gpu.run` joins.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.codes import DEVICE_LOST, NO_DEVICE, TIMED_OUT
from benchmarks.record import write_json

__all__ = [
    "CASE_SECONDS",
    "SCALES",
    "PartFile",
    "Setting",
    "deterministic",
    "empty",
    "freeze",
    "live_bytes",
    "name_of",
    "parse",
    "stack_of",
    "synchronize",
]

SCALES = ("full", "tiny")
CASE_SECONDS = 60.0
"""What a case may take where its part does not say otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a part runs."""

    device: torch.device
    scale: str
    output: Path
    only: tuple[str, ...] = ()
    label: str = ""
    """Of the file, where a part has several."""

    @property
    def is_cuda(self) -> bool:
        """Whether numbers are a GPU's."""
        return self.device.type == "cuda"

    @property
    def tiny(self) -> bool:
        """Whether the smallest settings are wanted."""
        return self.scale == "tiny"


def parse(argv: Sequence[str] | None, description: str) -> Setting:
    """The flags that every part takes; ends the process where the device is not there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names begin with these")
    parser.add_argument("--label", default="", help="of the file, where a part has several")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device; --device cpu --scale tiny tries the suite without one")
        raise SystemExit(NO_DEVICE)
    return Setting(
        device=torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu"),
        scale=arguments.scale,
        output=arguments.output,
        only=tuple(arguments.only),
        label=arguments.label,
    )


class PartFile:
    """The rows of one part, on disk from the moment they are known."""

    def __init__(self, setting: Setting, name: str, *, case_seconds: float = CASE_SECONDS) -> None:
        label = f"-{setting.label}" if setting.label else ""
        self._path = setting.output / f"{name}{label}.json"
        self._setting = setting
        self._case_seconds = case_seconds
        self._lock = threading.Lock()
        self._watch = threading.Timer(0, lambda: None)
        self._began = 0.0
        self._content: dict[str, Any] = {
            "part": name,
            "device": name_of(setting.device),
            "scale": setting.scale,
            "running": None,
            "rows": {},
        }
        if self._path.exists():
            self._content.update(json.loads(self._path.read_text("utf-8")))
            self._bury()
        self._joined: set[str] = set()
        whole = setting.output / f"{name}.json"
        if label and whole.exists():
            self._joined = {*json.loads(whole.read_text("utf-8"))["rows"]}
        freeze()

    def _bury(self) -> None:
        """The case that a process before this one died in is a row too."""
        died = self._content["running"]
        if died is not None and died not in self.rows:
            self.rows[died] = {"status": "crashed", "reason": "the process ended within this case"}
        self._content["running"] = None

    @property
    def rows(self) -> dict[str, Any]:
        """Rows by case."""
        rows: dict[str, Any] = self._content["rows"]
        return rows

    def add(self, key: str, value: Any) -> None:
        """Keep something beside the rows."""
        self._content[key] = value
        self._write()

    def case(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Run a case, unless it is known already or not asked for."""
        wanted = not self._setting.only or key.startswith(self._setting.only)
        if key in self.rows or key in self._joined or not wanted:
            return
        self.begin(key)
        try:
            row = _guarded(measure)
        finally:
            self._watch.cancel()
        self.end(key, row)
        if row["status"] == "device lost":
            raise SystemExit(DEVICE_LOST)

    def begin(self, key: str) -> None:
        """A case begins; `end` must follow in time."""
        self._content["running"] = key
        self._write()
        # a thread, for a call into CUDA that hangs never comes back to Python's signals
        self._watch = threading.Timer(self._case_seconds, self._give_up, [key])
        self._watch.daemon = True
        self._watch.start()
        self._began = time.perf_counter()

    def end(self, key: str, row: dict[str, Any]) -> None:
        """A case is over."""
        self._watch.cancel()
        with self._lock:
            row["seconds"] = round(time.perf_counter() - self._began, 3)
            self.rows[key] = row
            self._content["running"] = None
            self._write()
        reason = f": {row['reason']}" if row.get("reason") else ""
        print(f"  {key}: {row['status']}{reason} ({row['seconds']:.1f} s)", flush=True)

    def _give_up(self, key: str) -> None:
        """End the process in the middle of a case; the next one goes on behind it."""
        if key in self.rows:
            return
        reason = f"it took more than {self._case_seconds:g} s"
        self.end(key, {"status": "time out", "reason": reason})
        os._exit(TIMED_OUT)

    def _write(self) -> None:
        write_json(self._path, self._content)


def _guarded(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from memrt.errors import ConflictError

    try:
        return {"status": "ok", **measure()}
    except ConflictError as refused:
        return {"status": "refused", "reason": str(refused)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": "out of memory", "reason": str(error).splitlines()[0]}
    except Exception as error:  # noqa: BLE001 - one case that fails must not lose the others
        if isinstance(error, ValueError) and "not installed" in str(error):
            return {"status": "skipped", "reason": str(error).splitlines()[0]}
        text = f"{type(error).__name__}: {error}"
        sticky = "CUDA error" in text or "device-side assert" in text
        return {
            "status": "device lost" if sticky else "error",
            "reason": text.splitlines()[0],
            "traceback": traceback.format_exc(limit=-6),
        }
    finally:
        gc.collect()  # what the failed case's frames held


def name_of(device: torch.device) -> str:
    """The card's name, or "cpu": nothing measured on a CPU may look like a GPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def stack_of(text: str) -> list[str]:
    """`"none"` or `"a+b(option=1)"` as `memrt.prepare` takes it."""
    return [] if text == "none" else text.split("+")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def empty(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def freeze() -> None:
    """Spare the collector what is alive now (modules, classes): it runs after every case."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # extension modules report what is never freed


def live_bytes(device: torch.device) -> int:
    """Bytes of the tensors that live on the device.

    The allocator's count on CUDA. On the CPU, what Python's collector can reach.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return int(torch.cuda.memory_allocated(device))
    return sum({s.data_ptr(): s.nbytes() for s in _storages()}.values())


def _storages() -> Iterator[torch.UntypedStorage]:
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            yield thing.untyped_storage()


@contextmanager
def deterministic() -> Iterator[None]:
    """Algorithms that give the same bits each time (CUBLAS_WORKSPACE_CONFIG must be set)."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
