"""`memrt <command>`: finds the command, runs it, and turns errors of the user into one line.

A command is a module with `add_parser(subparsers)` and `run(arguments) -> int`. Its name goes into
`COMMANDS`; only the module of the command that was asked for is imported, and it imports torch and
transformers only when it runs.

Exit codes: 0 done, 1 error (or a stack of `compare` that did not run), 2 `plan` says that it does
not fit or `compat` that a stack cannot run, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import memrt
from memrt.cli.arguments import Parser, UsageError, nearest_option
from memrt.errors import NonFiniteGradientError, NonFiniteLossError
from memrt.kernels.quiet import without_hub_warning

if TYPE_CHECKING:
    import argparse

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "compare": "memrt.cli.compare",
    "compat": "memrt.cli.compat",
    "doctor": "memrt.cli.doctor",
    "export": "memrt.cli.export",
    "merge": "memrt.cli.merge",
    "plan": "memrt.cli.plan",
    "profile": "memrt.cli.profile",
    "report": "memrt.cli.report",
    "train": "memrt.cli.train",
}
"""Command -> module."""

ERROR = 1
INTERRUPTED = 130

_USER_ERRORS = (ValueError, OSError, MemoryError, NonFiniteLossError, NonFiniteGradientError)
"""Shown as one line; what else is raised is an error of ours and keeps its traceback."""

_DESCRIPTION = """\
Train models in less memory, and know where every byte is.

  memrt compare      fine-tune one model under several strategy stacks, print one table
  memrt compat       which strategies go together, and why others do not
  memrt doctor       what works on this machine, what does not, why, and what to install
  memrt export       a checkpoint as a folder that plain transformers loads
  memrt merge        a PEFT adapter folded into its base
  memrt plan         what a run will need: no weights, no GPU, exit code 0 fits, 2 does not
  memrt profile      a real run: predicted, counted, allocator and driver side by side
  memrt report       a finished run's report as Markdown, JSON, HTML page or PNG
  memrt train        a full fine-tune with evaluation, checkpoints, resume, and the report
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), None)
    name = "memrt" if command not in COMMANDS else f"memrt {command}"
    with_traceback = "--traceback" in words
    try:
        with without_hub_warning():
            code = _run(words, command)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a pipe that nobody reads is no traceback
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `memrt compare | head`: nobody reads any more; keep Python from flushing into the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except _USER_ERRORS as error:
        if with_traceback:
            raise
        print(f"{name}: error: {_text(error)}", file=sys.stderr)
        return ERROR


def _run(words: list[str], command: str | None) -> int:
    modules = _modules(command)
    parser = _parser(modules)
    try:
        arguments, unknown = parser.parse_known_args(words)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}{nearest_option(parser, unknown[0])}")
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return ERROR
    code: int = modules[arguments.command].run(arguments)
    return code


def _modules(command: str | None) -> dict[str, ModuleType]:
    """The one that was asked for; all of them for help and for unknown commands."""
    wanted = [command] if command in COMMANDS else list(COMMANDS)
    return {name: import_module(COMMANDS[name]) for name in wanted if name is not None}


def _parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    import argparse

    parser = Parser(
        prog="memrt",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"memrt {memrt.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    for module in modules.values():
        module.add_parser(subparsers)
    return parser


def _text(error: BaseException) -> str:
    """What to show of an error; system errors without their number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error).strip() or type(error).__name__
