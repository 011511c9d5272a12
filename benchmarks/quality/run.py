"""Quality on real text: every method from one base model, against AdamW at equal steps.

    MEMRT_DATA=folder python -m benchmarks.quality.run FOLDER                  # everything
    MEMRT_DATA=folder python -m benchmarks.quality.run FOLDER --task gsm8k --methods adamw galore

Trains the base model if FOLDER has none (`base_model`). For every task and method three short runs
choose a learning rate by the loss on a part of the held-out text, and one longer run with the best
is the result; methods whose update is the same, up to rounding, share their short runs. Each run is
a `memrt train` in a folder of its own, so that its report holds loss and memory by account.

Resumable: a run that has its report is not repeated, so an interrupted command is given again.
Budget on one core: about 40 minutes for the base model, then 4 hours (a minute a proxy, three a
full run). The result is written after every method, to `--output`, from the runs of the
tasks and methods that were asked for. Speeds have runs of their own: `benchmarks.quality.speeds`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.base_model import EVALUATION_TEXT, TRAINING_TEXTS, train_base_model
from benchmarks.quality.methods import BASELINE, METHODS, Method
from benchmarks.record import RESULTS, conditions, make_record, write_record
from memrt.cli.main import main as memrt

__all__ = ["TASKS", "main", "train_once"]

CLAIM = "From one base model, at equal steps: what a method's memory costs in held-out loss."
GOAL = "shown beside AdamW's; no bound is set on models this small"

HERE = Path(__file__).parent
TASKS: dict[str, dict[str, str]] = {
    "gsm8k": {"data.path": "gsm8k-train.jsonl"},
    "wikitext2": {"data.path": TRAINING_TEXTS[0], "data.evaluation_path": EVALUATION_TEXT},
}
PART_CHARACTERS = 100_000
"""Of the held-out text that proxies are judged by; results are of all of it."""


def held_out_part(folder: Path, data: Path) -> Path:
    """The beginning of the held-out text, written once."""
    path = folder / f"part-of-{EVALUATION_TEXT}"
    if not path.is_file():
        text = (data / EVALUATION_TEXT).read_text("utf-8")[:PART_CHARACTERS]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rpartition("\n")[0] + "\n", "utf-8")
    return path


def train_once(
    run: Path,
    *,
    base: Path,
    data: Path,
    task: str,
    method: Method,
    lr: float,
    steps: int,
    judged_by: Path | None = None,
) -> dict[str, Any]:
    """The report of one run; that of an earlier command where there is one."""
    report = run / "memrt" / "report.json"
    files = {name: data / file for name, file in TASKS[task].items()}
    if judged_by is not None and "data.evaluation_path" in files:
        files["data.evaluation_path"] = judged_by
    if not (run / "done").exists():
        code = memrt(
            [
                *("train", str(HERE / f"{task}.yaml"), "--output", str(run), "--overwrite"),
                *(f"{name}={path}" for name, path in files.items()),
                *("model.path=" + str(base), "training.learning_rate=" + str(lr)),
                *("training.max_steps=" + str(steps), f"strategies={list(method.strategies)}"),
                *method.overrides,
            ]
        )
        if code:
            raise RuntimeError(f"memrt train ended with {code}: {run}")
        for weights in run.glob("*.safetensors"):
            weights.unlink()  # 50 MB that nobody asks for
        (run / "done").touch()
    found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return found


def _method_rows(
    name: str, *, folder: Path, data: Path, task: str, proxy_steps: int, steps: int
) -> dict[str, Any]:
    """Three proxies and the full run of the best."""
    method = METHODS[name]
    where = {"base": folder / "model", "data": data, "task": task}

    def run_of(each: str, lr: float, count: int) -> Path:
        slug = f"{task}-{each}".replace(" ", "_").replace(",", "")
        return folder / "runs" / f"{slug}-{lr:g}-{count}"

    chooser = method.rate_of or name
    proxies = {
        lr: train_once(
            run_of(chooser, lr, proxy_steps),
            method=METHODS[chooser],
            lr=lr,
            steps=proxy_steps,
            judged_by=held_out_part(folder, data),
            **where,
        )
        for lr in METHODS[chooser].learning_rates
    }
    best = min(proxies, key=lambda lr: proxies[lr]["evaluation_loss"] or float("inf"))
    full = train_once(run_of(name, best, steps), method=method, lr=best, steps=steps, **where)
    return {
        "task": task,
        "method": name,
        "strategies": list(method.strategies),
        "learning_rate": best,
        "learning_rate_of": chooser,
        "proxy_losses": {f"{lr:g}": each["evaluation_loss"] for lr, each in proxies.items()},
        **{key: full[key] for key in ("evaluation_loss", "loss", "peak_bytes", "account_maxima")},
    }


def _base_loss(folder: Path, data: Path, task: str) -> float:
    """The base model's own held-out loss: a run of one step with a learning rate of 0."""
    run = folder / "runs" / f"{task}-base"
    report = train_once(
        run,
        base=folder / "model",
        data=data,
        task=task,
        method=METHODS[BASELINE],
        lr=0.0,
        steps=1,
    )
    loss: float = report["evaluation_loss"]
    return loss


def _beside_adamw(row: dict[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row with its loss beside AdamW's, where there is one."""
    above = baseline and row["evaluation_loss"] - baseline["evaluation_loss"]
    return {**row, "above_adamw": above}


def _outcome(rows: list[dict[str, Any]], base: Mapping[str, float]) -> dict[str, Any]:
    baseline = {row["task"]: row for row in rows if row["method"] == BASELINE}
    return {
        "repetitions": rows,
        "summary": {
            "base_evaluation_loss": dict(base),
            "rows": [_beside_adamw(row, baseline.get(row["task"])) for row in rows],
        },
        "met": None,
        "reason": "; ".join(_extremes(task, loss, rows) for task, loss in base.items()),
    }


def _extremes(task: str, base: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence of a task: the base, AdamW, and the methods that end lowest and highest."""
    losses = {row["method"]: row["evaluation_loss"] for row in rows if row["task"] == task}
    words = [f"{task}: held-out loss of the base {base:.3f}"]
    if BASELINE in losses:
        words.append(f"AdamW {losses[BASELINE]:.3f}")
    for word, choose in (("lowest", min), ("highest", max)):
        name = choose(losses, key=losses.__getitem__, default=None)
        words += [] if name is None else [f"the {word} {name} {losses[name]:.3f}"]
    return ", ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where base model and runs are kept")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--proxy-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: benchmarks/results")
    options = parser.parse_args(argv)
    data = Path(os.environ.get("MEMRT_DATA", "")).resolve()
    if not (data / TRAINING_TEXTS[0]).is_file():
        parser.error(f"MEMRT_DATA={str(data)!r} must name the folder with the texts")
    found = conditions(
        configuration={"proxy_steps": options.proxy_steps, "steps": options.steps}, device="cpu"
    )
    if train_base_model(options.folder, data):
        return 1
    base, rows = {}, []

    def write() -> None:
        record = make_record(
            name="quality", claim=CLAIM, goal=GOAL, found=found, outcome=_outcome(rows, base)
        )
        print(f"wrote {write_record(record, options.output)}", file=sys.stderr)

    for task in options.task:
        base[task] = _base_loss(options.folder, data, task)
        for name in options.methods:
            rows.append(
                _method_rows(
                    name,
                    folder=options.folder,
                    data=data,
                    task=task,
                    proxy_steps=options.proxy_steps,
                    steps=options.steps,
                )
            )
            write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
