"""The GPU suite: one command, no network, one JSON; every part in a process of its own.

    bash benchmarks/gpu/run.sh OUT                                  # on a CUDA device
    bash benchmarks/gpu/run.sh OUT --device cpu --scale tiny        # see that it runs, without one
    bash benchmarks/gpu/run.sh OUT --parts memory --minutes 5

This process makes no CUDA context: what NVML says of other processes would hold it. Plans need no
device and are made beside the first parts. A part that dies is started again and goes on after the
case it died in. `summary.json` is written anew after every part, so that it is always of use.
Exit code: 0 when everything ran and the goal is met (or cannot be judged, on the CPU), 1 when not,
3 without a device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import summary
from benchmarks.gpu.codes import NO_DEVICE
from benchmarks.record import ROOT, write_json

__all__ = ["PARTS", "main"]

MOST_STARTS = 4
MODEL_SIZES = ("0.1B", "0.5B", "1B", "3B", "8B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A process: its module, the file that it fills, and the seconds that it may take."""

    name: str
    module: str
    limit_seconds: float
    only: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_device: bool = True

    def command(self, arguments: argparse.Namespace) -> list[str]:
        """The command line."""
        only = ["--only", *self.only] if self.only else []
        device = arguments.device if self.needs_device else "cpu"
        return [
            *(sys.executable, "-m", f"benchmarks.gpu.{self.module}"),
            *("--device", device, "--scale", arguments.scale),
            *("--output", str(arguments.output), *only),
        ]


PLANS = Part(
    name="plans",
    module="plans",
    limit_seconds=540,
    environment={"CUDA_VISIBLE_DEVICES": ""},
    needs_device=False,
)

PARTS: dict[str, list[Part]] = {
    "constants": [Part(name="constants", module="constants", limit_seconds=60)],
    "correctness": [
        Part(
            name="correctness",
            module="correctness",
            limit_seconds=170,
            environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        )
    ],
    "operators": [Part(name="operators", module="operators", limit_seconds=60)],
    "memory": [
        Part(name="memory", module="memory", limit_seconds=90, only=(f"{size} ",))
        for size in MODEL_SIZES
    ],
    "speed": [Part(name="speed", module="speed", limit_seconds=100)],
    "updates": [Part(name="updates", module="updates", limit_seconds=120)],
    "tests": [Part(name="tests", module="device_tests", limit_seconds=60)],
}

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/gpu/run.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="folder of the JSON files; made if need be")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    return parser


class _Suite:
    """One run of the suite."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.began = time.monotonic()
        self.parts: list[dict[str, Any]] = []
        self._plans: subprocess.Popen[bytes] | None = None

    def seconds_left(self) -> float:
        """Until the deadline, less what the summary takes."""
        return float(self.arguments.minutes) * 60 - (time.monotonic() - self.began) - 5

    def start_plans(self) -> None:
        """Beside the other parts."""
        self._plans = subprocess.Popen(
            PLANS.command(self.arguments), cwd=ROOT, env=_environment(PLANS)
        )

    def stop_plans(self) -> None:
        """End them where they still run."""
        if self._plans is not None:
            self._plans.kill()
            self._plans.wait()
            self._plans = None

    def wait_for_plans(self) -> None:
        """Join them; they end with the time that is left."""
        if self._plans is None:
            return
        began = time.monotonic()
        try:
            code: int | None = self._plans.wait(timeout=max(1.0, self.seconds_left()))
        except subprocess.TimeoutExpired:
            self.stop_plans()
            code = None
        self._plans = None
        self._note(PLANS, code=code, began=began, starts=1)

    def run(self, part: Part) -> int | None:
        """Run a part, again where it dies; returns its last exit code, None when time was up."""
        began = time.monotonic()
        codes: list[int | None] = []
        while len(codes) < MOST_STARTS:
            spent = time.monotonic() - began
            codes.append(self._start(part, min(part.limit_seconds - spent, self.seconds_left())))
            if codes[-1] in (0, NO_DEVICE, None):
                break
        self._note(part, code=codes[-1], began=began, starts=len(codes))
        return codes[-1]

    def _start(self, part: Part, limit: float) -> int | None:
        if limit <= 0:
            return None
        try:
            done = subprocess.run(
                part.command(self.arguments),
                cwd=ROOT,
                env=_environment(part),
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
        return done.returncode

    def _note(self, part: Part, *, code: int | None, began: float, starts: int) -> None:
        seconds = time.monotonic() - began
        self.parts.append(
            {
                "part": part.name,
                "only": list(part.only),
                "exit_code": code,
                "timed_out": code is None,
                "starts": starts,
                "seconds": round(seconds, 1),
            }
        )
        ended = "time is up" if code is None else f"exit code {code}"
        print(f"{' '.join((part.name, *part.only))}: {ended} after {seconds:.0f} s", flush=True)

    def summarise(self) -> dict[str, Any]:
        """The record of what is there, written as summary.json."""
        record = summary.record(
            _contents(self.arguments.output),
            self.parts,
            seconds=round(time.monotonic() - self.began, 1),
            device=self.arguments.device,
            scale=self.arguments.scale,
        )
        write_json(self.arguments.output / "summary.json", record)
        return record


def _environment(part: Part) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **part.environment}


def _contents(folder: Path) -> dict[str, Any]:
    """The parts' files by name."""
    names = ("plans", *PARTS)
    return {
        name: json.loads((folder / f"{name}.json").read_text("utf-8"))
        for name in names
        if (folder / f"{name}.json").exists()
    }


def _chosen(arguments: argparse.Namespace) -> list[Part]:
    parts = [part for name in PARTS if name in arguments.parts for part in PARTS[name]]
    if arguments.scale == "full":
        return parts
    first_memory = next((part for part in parts if part.name == "memory"), None)
    tiny = Part(name="memory", module="memory", limit_seconds=120)
    return [
        tiny if part is first_memory else part
        for part in parts
        if part.name != "memory" or part is first_memory
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, then print what came out."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.output = arguments.output.resolve()
    if arguments.output.is_dir() and any(arguments.output.glob("*.json")):
        parser.error(f"{arguments.output} holds results already; name another folder")
    arguments.output.mkdir(parents=True, exist_ok=True)
    suite = _Suite(arguments)
    parts = _chosen(arguments)
    plans_wanted = "memory" in arguments.parts
    if plans_wanted:
        suite.start_plans()
    try:
        for part in parts:
            if part.name == "speed":
                suite.wait_for_plans()
            if suite.run(part) == NO_DEVICE:
                return NO_DEVICE
            suite.summarise()
        suite.wait_for_plans()
    finally:
        suite.stop_plans()
    record = suite.summarise()
    print(summary.text(record))
    complete = all(part["exit_code"] == 0 for part in suite.parts)
    return 0 if complete and record["verdict"] != "missed" else 1


if __name__ == "__main__":
    sys.exit(main())
