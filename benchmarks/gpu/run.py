"""The GPU suite: one command, no network, one JSON; every part in a process of its own.

    bash benchmarks/gpu/run.sh OUT                                  # on a CUDA device
    bash benchmarks/gpu/run.sh OUT --resume                         # what the first had no time for
    bash benchmarks/gpu/run.sh OUT --resume --parts seventy_b --minutes 9          # a 70B model
    bash benchmarks/gpu/run.sh OUT --device cpu --scale tiny        # see that it runs, without one

A command ends after `--minutes`: each part has a share of them, and what one leaves over the next
ones have. `seventy_b` (a 70B model in four bits, beside QLoRA under transformers' Trainer) runs
only where it is named. `--resume` goes on in a folder that holds results: cases that have a row are
not run again; where `summary.json` alone was kept, it holds all the others' content.

This process makes no CUDA context: what NVML says of other processes would hold it. Plans need no
device and are made beside the first parts; correctness and operators, which measure neither time
nor the driver, run beside each other. A part that dies, or a case that takes longer than it may,
costs one row: the part is started again and goes on behind it. `summary.json` is written anew after
every part, so that it is always of use. Exit code: 0 when everything ran and the goal is met (or
cannot be judged, on the CPU), 1 when not, 3 without a device.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import summary
from benchmarks.gpu.codes import NO_DEVICE
from benchmarks.gpu.parts import DEFAULT_PARTS, PARTS, Part, plans_part, stages
from benchmarks.record import ROOT, write_json

__all__ = ["main"]

MOST_STARTS = 4
SUMMARY_SECONDS = 5.0
PLANS_SECONDS = 30.0
"""How long the first part that takes times waits for the plans."""

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
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(DEFAULT_PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--resume", action="store_true", help="go on in a folder with results")
    parser.add_argument(
        "--beside",
        type=int,
        default=max(1, min(9, os.cpu_count() or 1)),
        help="processes at a time, of the parts that may run beside each other",
    )
    return parser


class _Suite:
    """One run of the suite."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.began = time.monotonic()
        self.parts: list[dict[str, Any]] = []
        self._running: list[subprocess.Popen[bytes]] = []
        self._plans: subprocess.Popen[bytes] | None = None
        self._plans_part: Part | None = None

    def seconds_left(self) -> float:
        """Until the deadline, less what the summary takes."""
        minutes = float(self.arguments.minutes)
        return minutes * 60 - (time.monotonic() - self.began) - SUMMARY_SECONDS

    def seconds_of(self, share: float) -> float:
        """From now to the end of a part that ends at this share of the time."""
        spent = time.monotonic() - self.began
        return share * (self.seconds_left() + spent) - spent

    def start_plans(self, part: Part) -> None:
        """Beside the other parts."""
        self._plans_part = part
        self._plans = _process(part, self.arguments)

    def stop_plans(self) -> None:
        """End them where they still run."""
        if self._plans is not None:
            _end(self._plans)
            self._plans = None

    def wait_for_plans(self, seconds: float | None = None) -> None:
        """Join them; without `seconds` they end with the time that is left."""
        if self._plans is None or self._plans_part is None:
            return
        began = time.monotonic()
        limit = self.seconds_left()
        try:
            code: int | None = self._plans.wait(timeout=max(1.0, min(limit, seconds or limit)))
        except subprocess.TimeoutExpired:
            if seconds is not None and limit > seconds:
                return
            self.stop_plans()
            code = None
        self._plans = None
        self._note(self._plans_part, code=code, began=began, starts=1)

    def run(self, part: Part, seconds: float | None = None) -> int | None:
        """Run a part, again where it dies; returns its last exit code, None when time was up."""
        began = time.monotonic()
        codes: list[int | None] = []
        limit = self.seconds_left() if seconds is None else seconds
        while len(codes) < MOST_STARTS:
            spent = time.monotonic() - began
            codes.append(self._start(part, min(limit - spent, self.seconds_left())))
            if codes[-1] in (0, NO_DEVICE, None):
                break
        self._note(part, code=codes[-1], began=began, starts=len(codes))
        return codes[-1]

    def run_beside(self, parts: Sequence[Part], seconds: float) -> bool:
        """Run parts beside each other; False without a device."""
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(max_workers=self.arguments.beside) as pool:
            try:
                codes = list(pool.map(lambda part: self.run(part, end - time.monotonic()), parts))
            except KeyboardInterrupt:
                for process in self._running:
                    _end(process)
                raise
        return NO_DEVICE not in codes

    def _start(self, part: Part, limit: float) -> int | None:
        if limit <= 0:
            return None
        process = _process(part, self.arguments)
        self._running.append(process)
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            _end(process)
            self._forgive(part)
            return None
        finally:
            _end(process)
            self._running.remove(process)

    def _forgive(self, part: Part) -> None:
        """A case that was ended with its part's time is no crash: another command runs it."""
        path = part.file(self.arguments.output)
        if path.exists():
            write_json(path, {**json.loads(path.read_text("utf-8")), "running": None})

    def _note(self, part: Part, *, code: int | None, began: float, starts: int) -> None:
        seconds = time.monotonic() - began
        self.parts.append(
            {
                "part": part.name,
                "label": part.title,
                "exit_code": code,
                "timed_out": code is None,
                "starts": starts,
                "seconds": round(seconds, 1),
            }
        )
        ended = "time is up" if code is None else f"exit code {code}"
        print(f"{part.title}: {ended} after {seconds:.0f} s", flush=True)

    def summarise(self, earlier: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """The record of what is there, written as summary.json."""
        again = {part["label"] for part in self.parts}
        record = summary.record(
            contents_of(self.arguments.output),
            [*(part for part in earlier if part["label"] not in again), *self.parts],
            seconds=round(time.monotonic() - self.began, 1),
            device=self.arguments.device,
            scale=self.arguments.scale,
        )
        write_json(self.arguments.output / "summary.json", record)
        return record


def _process(part: Part, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A part's process, and the group of what it starts itself."""
    return subprocess.Popen(
        part.command(arguments),
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **part.environment},
        process_group=0,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def contents_of(folder: Path) -> dict[str, Any]:
    """The parts' content by name; files of one part are joined."""
    found: dict[str, Any] = {}
    for name in ("plans", *PARTS):
        paths = [folder / f"{name}.json", *sorted(folder.glob(f"{name}-*.json"))]
        pieces = [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]
        if pieces:
            rows = {key: row for piece in pieces for key, row in piece["rows"].items()}
            found[name] = {**pieces[-1], "rows": rows}
    return found


def _join(folder: Path) -> None:
    """One file a part: few files are easier to carry."""
    for name, content in contents_of(folder).items():
        pieces = list(folder.glob(f"{name}-*.json"))
        if pieces:
            write_json(folder / f"{name}.json", content)
        for piece in pieces:
            piece.unlink()


def _earlier(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Any]:
    """The parts that ran before in this folder, whose files are put back where they are gone."""
    folder = arguments.output
    if not (folder.is_dir() and any(folder.glob("*.json"))):
        return []
    if not arguments.resume:
        parser.error(f"{folder} holds results already; name another folder, or give --resume")
    path = folder / "summary.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text("utf-8"))
    wanted = {"device": arguments.device, "scale": arguments.scale}
    if record["conditions"]["configuration"] != wanted:
        parser.error(f"{folder} holds results of {record['conditions']['configuration']}")
    for name, content in record["repetitions"].items():
        known = (folder / f"{name}.json").exists() or any(folder.glob(f"{name}-*.json"))
        if name in ("plans", *PARTS) and not known:
            write_json(folder / f"{name}.json", content)
    return list(record["summary"]["parts"])


def _run_parts(suite: _Suite, earlier: Sequence[Mapping[str, Any]]) -> bool:
    """Every stage in turn; False without a device."""
    arguments = suite.arguments
    done = {part["label"] for part in earlier if part["exit_code"] == 0}
    plans = plans_part(arguments.parts, arguments.scale)
    if plans is not None and plans.title not in done:
        suite.start_plans(plans)
    left = [
        [part for part in stage if part.title not in done]
        for stage in stages(arguments.parts, arguments.scale)
    ]
    left = [stage for stage in left if stage]
    shares = [max(part.share_seconds for part in stage) for stage in left]
    timed = next((index for index, stage in enumerate(left) if stage[0].takes_times), None)
    for index, stage in enumerate(left):
        if index == timed:
            suite.wait_for_plans(PLANS_SECONDS)
        # on the CPU nothing hangs, and nobody knows how fast it is
        whole = arguments.device == "cpu"
        share = 1.0 if whole else sum(shares[: index + 1]) / sum(shares)
        if not suite.run_beside(stage, suite.seconds_of(share)):
            return False
        suite.summarise(earlier)
    suite.wait_for_plans()
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, then print what came out."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.output = arguments.output.resolve()
    earlier = _earlier(arguments, parser)
    arguments.output.mkdir(parents=True, exist_ok=True)
    suite = _Suite(arguments)
    try:
        if not _run_parts(suite, earlier):
            return NO_DEVICE
    finally:
        suite.stop_plans()
    _join(arguments.output)
    record = suite.summarise(earlier)
    print(summary.text(record))
    complete = all(part["exit_code"] == 0 for part in suite.parts)
    return 0 if complete and record["verdict"] != "missed" else 1


if __name__ == "__main__":
    sys.exit(main())
