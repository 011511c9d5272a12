"""What the parts of the GPU suite share: the device, the scale, and a file of rows that survives.

A part is a process that fills one JSON, row by row. Before a case begins its name is written as
`running`, after it the row; a process that dies leaves the rows before, and the one that is started
in its place finds the case that killed it and goes on with the next. Errors that leave the device
usable become a row; those that do not (CUDA errors are sticky) end the process.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.codes import DEVICE_LOST, NO_DEVICE
from benchmarks.record import write_json

__all__ = [
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a part runs."""

    device: torch.device
    scale: str
    output: Path
    only: tuple[str, ...] = ()

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
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device; --device cpu --scale tiny tries the suite without one")
        raise SystemExit(NO_DEVICE)
    return Setting(
        device=torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu"),
        scale=arguments.scale,
        output=arguments.output,
        only=tuple(arguments.only),
    )


class PartFile:
    """The rows of one part, on disk from the moment they are known."""

    def __init__(self, setting: Setting, name: str) -> None:
        self._path = setting.output / f"{name}.json"
        self._setting = setting
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
        if key in self.rows or not wanted:
            return
        self._content["running"] = key
        self._write()
        began = time.perf_counter()
        row = _guarded(measure)
        row["seconds"] = round(time.perf_counter() - began, 3)
        self.rows[key] = row
        self._content["running"] = None
        self._write()
        reason = f": {row['reason']}" if row.get("reason") else ""
        print(f"  {key}: {row['status']}{reason} ({row['seconds']:.1f} s)", flush=True)
        if row["status"] == "device lost":
            raise SystemExit(DEVICE_LOST)

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
