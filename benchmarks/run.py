"""Runs the benchmarks and writes their committed results.

Run it at the root of a checkout:

    python -m benchmarks.run                                  # list them
    python -m benchmarks.run plan_time ledger_cost            # run two, write the results
    python -m benchmarks.run plan_time --set repetitions=9    # with another setting
    python -m benchmarks.run plan_time --tiny --output /tmp/x # seconds, to see that it works

A benchmark is a folder here with a `benchmark.py`: CLAIM and GOAL (one sentence each), DEFAULTS and
TINY (its options), and `run(options)`, which returns `repetitions`, `summary`, `met` and `reason`.
`python -m benchmarks.render` puts what is in `benchmarks/results` into `benchmarks/README.md`. The
GPU suite has a command of its own: `bash benchmarks/gpu/run.sh`.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, conditions, make_record, write_record

__all__ = ["chosen_options", "main", "names"]


def names() -> list[str]:
    """The folders that hold a benchmark."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/benchmark.py"))


def _module(name: str) -> Any:
    if name not in names():
        raise ValueError(f"benchmark {name!r} is unknown; use one of {', '.join(names())}")
    return import_module(f"benchmarks.{name}.benchmark")


def chosen_options(module: Any, *, tiny: bool, settings: Sequence[str]) -> dict[str, Any]:
    """The module's options with `name=value` settings put in, each of the default's type."""
    options = {**module.DEFAULTS, **(module.TINY if tiny else {})}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or name not in options:
            raise ValueError(
                f"--set {setting!r}: write name=value with one of {', '.join(sorted(options))}"
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        expected = type(options[name])
        if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
            raise ValueError(f"--set {setting!r}: {name} must be of type {expected.__name__}")
        options[name] = value
    return options


def run_one(name: str, *, options: Mapping[str, Any]) -> dict[str, Any]:
    """Run a benchmark and return its record; conditions are taken before it makes any load."""
    module = _module(name)
    found = conditions(configuration=options, device="cpu")
    return make_record(
        name=name, claim=module.CLAIM, goal=module.GOAL, found=found, outcome=module.run(options)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="none: list them; all: every one")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--tiny", action="store_true", help="the smallest settings that still run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: benchmarks/results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """List or run."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.names:
        for name in names():
            module = _module(name)
            print(f"{name:<18}{module.CLAIM}\n{'':<18}goal: {module.GOAL}")
        return 0
    wanted = names() if arguments.names == ["all"] else arguments.names
    if arguments.tiny and arguments.output.resolve() == RESULTS:
        parser.error("--tiny makes no result that is worth keeping; name a folder with --output")
    try:
        chosen = {
            name: chosen_options(_module(name), tiny=arguments.tiny, settings=arguments.settings)
            for name in wanted
        }
    except ValueError as error:
        parser.error(str(error))
    for name, options in chosen.items():
        print(f"{name}: running", flush=True)
        record = run_one(name, options=options)
        path = write_record(record, arguments.output)
        print(f"{name}: {record['verdict']}: {record['verdict_reason']}\n{name}: wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
