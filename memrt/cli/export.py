"""`memrt export CHECKPOINT OUTPUT`: a checkpoint as a folder that plain transformers loads."""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from memrt.cli.arguments import add_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memrt.export import Exported

__all__ = ["add_export_flags", "add_parser", "export", "run"]

_DESCRIPTION = """\
Write a checkpoint of a run as a plain Hugging Face folder: packed weights become dense, adapters
are folded into the base, state of optimizer and strategies stays behind. Tensors are read, made
plain and written one module at a time; the model is in memory as a whole only for --verify, and for
adapters that cannot be folded so (see memrt merge).

  memrt export run/checkpoint-500 plain
  memrt export run/checkpoint-500 plain --base meta-llama/Llama-3.2-1B --dtype bf16 --verify

OUTPUT must be new or empty; it appears when it is whole.
"""

DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "export",
        summary="a checkpoint as a folder that plain transformers loads",
        description=_DESCRIPTION,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's checkpoint-N folder")
    parser.add_argument("output", metavar="OUTPUT", help="a new or empty folder")
    parser.add_argument(
        "--base",
        metavar="DIR_OR_HUB_ID",
        help="of a checkpoint with adapters: the model that they were trained on (default: the one "
        "that they name)",
    )
    add_export_flags(parser)


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    """What `export` and `merge` share."""
    from memrt.model_source import TASKS

    parser.add_argument(
        "--verify",
        action="store_true",
        help="load the run's model and what was written, compare the logits of a fixed random "
        "batch, and keep nothing if rounding does not explain the difference",
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        metavar="bf16|fp16|fp32",
        help="of the weights (default: as they are stored)",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a file, such as 5GB or 500MiB (default: 5GB)",
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=f"of an adapter's base, where nothing tells: {', '.join(TASKS)}",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print what was done as JSON on stdout, and nothing else",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error was raised in the code"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was written."""
    return export(arguments.checkpoint, arguments)


def export(source: str, arguments: argparse.Namespace) -> int:
    """Write `source` to `arguments.output`; the exit code."""
    import torch
    from transformers.utils import logging

    from memrt.export import export_checkpoint

    dtype = None if arguments.dtype is None else getattr(torch, DTYPES[arguments.dtype])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with ExitStack() as context, _flag_names():
        done = export_checkpoint(
            source,
            arguments.output,
            base=arguments.base,
            task=arguments.task,
            dtype=dtype,
            max_shard_size=arguments.max_shard_size,
            verify=arguments.verify,
            on_written=_bar(context),
        )
    if arguments.json:
        print(json.dumps(done.to_json(), indent=2))
    else:
        print("\n".join(_lines(done)))
    return 0


@contextmanager
def _flag_names() -> Iterator[None]:
    """An error of `memrt.export` with the command line's name for its argument."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"^output_dir=", "OUTPUT=", str(error))) from error


def _bar(context: ExitStack) -> Callable[[int], None]:
    """A progress bar on a terminal's stderr, made when the number of tensors is known."""
    if not sys.stderr.isatty():
        return lambda total: None
    from rich.console import Console
    from rich.progress import Progress

    bar = context.enter_context(Progress(console=Console(stderr=True), transient=True))
    task = bar.add_task("writing weights", total=None)

    def advance(total: int) -> None:
        bar.update(task, total=total, advance=1)

    return advance


def _lines(done: Exported) -> list[str]:
    size = f"{done.num_bytes / 2**30:.2f} GiB" if done.num_bytes >= 2**28 else _mebibytes(done)
    files = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
    lines = [
        f"{done.path}: {done.num_parameters:,} parameters in {done.dtype}, {size} in {files}",
    ]
    if done.num_folded:
        lines.append(f"folded: the adapters of {done.num_folded} layers")
    if done.num_unpacked:
        lines.append(f"unpacked: {done.num_unpacked} weights, dense with their rounded values")
    lines += [f"note: {note}" for note in done.notes]
    if done.check is not None:
        lines.append(f"verified: {done.check}")
    return lines


def _mebibytes(done: Exported) -> str:
    return f"{done.num_bytes / 2**20:.2f} MiB"
