"""Tokens a second of every method on the base language model, one after another.

    MEMRT_DATA=folder python -m benchmarks.quality.speeds FOLDER        # on a quiet machine

FOLDER is that of `benchmarks.quality.run`, whose base model is trained if there is none. Every run
is a `memrt train` of `--steps` steps without evaluation, behind the steps that the report counts.
Seconds are the processor's, with torch on one thread, so that what else the machine does is not in
them; caches and memory are shared all the same, so nothing is kept from an earlier command. In
every round each method runs once, and is compared with AdamW's run of that round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality.base_model import TRAINING_TEXTS, train_base_model
from benchmarks.quality.methods import BASELINE, METHODS
from benchmarks.quality.run import TASKS, train_once
from benchmarks.record import RESULTS, conditions, make_record, write_record
from benchmarks.step_times import one_thread
from memrt import throughput
from memrt.memory_report import NUM_STEPS

__all__ = ["main", "markdown"]

NAME = "quality_speeds"
CLAIM = "On the base model of the comparisons of quality: tokens a second of every method."
GOAL = "shown beside AdamW's; goals of speed are those of ladder_step, galore_step, optimizer_step"
STEPS = 50
"""A refresh interval of the low-rank methods, and whole ones of the layerwise."""


@contextmanager
def _processor_time() -> Iterator[None]:
    """A report's seconds are those of the processor, on one thread."""
    before = throughput.perf_counter
    throughput.perf_counter = time.process_time
    try:
        with one_thread():
            yield
    finally:
        throughput.perf_counter = before


def _tokens_per_second(name: str, *, task: str, base: Path, data: Path, steps: int) -> float:
    method = METHODS[name]
    without = ("data.evaluation_path=null", "data.evaluation_fraction=0")
    with tempfile.TemporaryDirectory() as folder, _processor_time():
        report = train_once(
            Path(folder),
            base=base,
            data=data,
            task=task,
            method=replace(method, overrides=(*method.overrides, *without)),
            lr=METHODS[method.rate_of or name].learning_rates[0],
            steps=NUM_STEPS + steps,
        )
    speed: float = report["tokens_per_second"]
    return speed


def _summary(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over rounds: of a method's speed, and of its ratio to AdamW's of the same round."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in repetitions:
        found.setdefault((each["task"], each["method"]), []).append(each)
    baseline = {
        (each["task"], each["round"]): each["tokens_per_second"]
        for each in repetitions
        if each["method"] == BASELINE
    }

    def ratio(each: Mapping[str, Any]) -> float:
        speed: float = each["tokens_per_second"] / baseline[each["task"], each["round"]]
        return speed

    rows = [
        {
            "task": task,
            "method": method,
            "tokens_per_second": statistics.median(each["tokens_per_second"] for each in runs),
            "of_adamws": statistics.median(map(ratio, runs)),
        }
        for (task, method), runs in found.items()
    ]
    return {"rows": rows}


def _extremes(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    fastest, slowest = (choose(rows, key=lambda row: row["of_adamws"]) for choose in (max, min))
    baseline = next(row for row in rows if row["method"] == BASELINE)
    return (
        f"{task}: AdamW {baseline['tokens_per_second']:,.0f} tokens/s, "
        f"the fastest {fastest['method']} {fastest['of_adamws']:.2f} ×, "
        f"the slowest {slowest['method']} {slowest['of_adamws']:.2f} ×"
    )


def _outcome(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summary = _summary(repetitions)
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary["rows"]:
        by_task.setdefault(row["task"], []).append(row)
    reason = "; ".join(_extremes(task, rows) for task, rows in by_task.items())
    return {"repetitions": list(repetitions), "summary": summary, "met": None, "reason": reason}


def markdown(record: Mapping[str, Any]) -> str:
    """A row for each method, a column for each task: tokens/s and the ratio to AdamW's."""
    rows = record["summary"]["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {
        (row["task"], row["method"]): f"{row['tokens_per_second']:,.0f} ({row['of_adamws']:.2f})"
        for row in rows
    }
    found = record["conditions"]
    lines = [
        f"Tokens a second of one core's time and, in brackets, beside AdamW's; {found['cpu']}.",
        "",
        "| " + " | ".join(("method", *tasks)) + " |",
        "| " + " | ".join(("---",) * (1 + len(tasks))) + " |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        beside = (cells.get((task, method), "") for task in tasks)
        lines.append("| " + " | ".join((method, *beside)) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.speeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the base model is")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="fewer will do for methods without intervals"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: benchmarks/results")
    options = parser.parse_args(argv)
    data = Path(os.environ.get("MEMRT_DATA", "")).resolve()
    if not (data / TRAINING_TEXTS[0]).is_file():
        parser.error(f"MEMRT_DATA={str(data)!r} must name the folder with the texts")
    if BASELINE not in options.methods:
        parser.error(f"--methods: {BASELINE} must be among them, for speeds are given beside it")
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    configuration = {"steps": options.steps, "rounds": options.rounds}
    found = conditions(configuration=configuration, device="cpu")
    if train_base_model(options.folder, data):
        return 1
    repetitions = [
        {
            "task": task,
            "round": number,
            "method": name,
            "tokens_per_second": _tokens_per_second(
                name, task=task, base=options.folder / "model", data=data, steps=options.steps
            ),
        }
        for number in range(options.rounds)
        for task in options.task
        for name in options.methods
    ]
    outcome = _outcome(repetitions)
    record = make_record(name=NAME, claim=CLAIM, goal=GOAL, found=found, outcome=outcome)
    print(f"wrote {write_record(record, options.output)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
