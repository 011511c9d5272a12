"""Flags that the commands share, and a parser whose errors are ours to print."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

__all__ = [
    "STACK_HELP",
    "Parser",
    "UsageError",
    "add_command",
    "add_data_flags",
    "add_model_flags",
    "add_report_flags",
    "add_training_flags",
    "fraction",
    "nearest_option",
    "whole_number",
]

STACK_HELP = """\
A strategy is a name, or a name with options: lisa, "galore(rank=64, every=50)" (quote the
parentheses for the shell). A stack joins strategies with +: "galore(rank=64)+int8_states".
none is the empty stack.
"""


class UsageError(ValueError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that every error has the same form and exit code 1."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every misuse."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def nearest_option(parser: argparse.ArgumentParser, word: str) -> str:
    """A hint at the option that was meant."""
    known = {option for option in parser._option_string_actions if option.startswith("--")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                known.update(o for o in each._option_string_actions if o.startswith("--"))
    close = get_close_matches(word.split("=")[0], sorted(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else f"; see `{parser.prog} --help`"


def whole_number(smallest: int) -> Callable[[str], int]:
    """A converter for whole numbers of at least `smallest`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be a whole number of at least {smallest}"
            )
        return value

    return convert


def _number(low: float, high: float, *, low_is_allowed: bool) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low <= value < high) or (value == low and not low_is_allowed):
            bound = "at least" if low_is_allowed else "above"
            below = "" if high == float("inf") else f" and below {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {bound} {low:g}{below}")
        return value

    return convert


def add_command(
    subparsers: Any, name: str, *, summary: str, description: str
) -> argparse.ArgumentParser:
    """A command's parser; `description` is printed as it is written."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What is trained and at which shapes."""
    group = parser.add_argument_group("model and shapes")
    group.add_argument(
        "--model",
        metavar="DIR_OR_CONFIG_OR_HUB_ID",
        help="a folder, a config.json or a hub id (default: the embedded Llama of 8.9 M "
        "parameters); a folder with config.json alone is given random weights",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that a model brings with it; read it first",
    )
    group.add_argument(
        "--task",
        metavar="TASK",
        help="what the model is trained for (default: what its config names); "
        "sequence-classification puts a new head on a model without one",
    )
    _add_shape_flags(group)
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the weights and the arithmetic (default: auto, the config's, else float32)",
    )
    group.add_argument(
        "--max-grad-norm",
        type=_number(0, float("inf"), low_is_allowed=True),
        default=1.0,
        metavar="NORM",
        help="clip the gradient's norm, 0 is off (default: 1.0)",
    )
    group.add_argument(
        "--seed",
        type=whole_number(0),
        default=42,
        help="of weights, data order and dropout (default: 42)",
    )


def _add_shape_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seq",
        "--sequence-length",
        dest="sequence_length",
        type=whole_number(2),
        default=256,
        metavar="TOKENS",
        help="tokens of an example (default: 256)",
    )
    group.add_argument(
        "--batch",
        "--batch-size",
        dest="batch_size",
        type=whole_number(1),
        default=4,
        metavar="EXAMPLES",
        help="examples of a micro-batch (default: 4)",
    )
    group.add_argument(
        "--accumulation",
        dest="accumulation_steps",
        type=whole_number(1),
        default=1,
        metavar="MICRO_BATCHES",
        help="micro-batches of an optimizer step (default: 1)",
    )


def fraction(text: str) -> float:
    """A converter for numbers from 0 to below 1."""
    return _number(0, 1, low_is_allowed=True)(text)


def add_data_flags(parser: argparse.ArgumentParser, *, default: str) -> argparse._ArgumentGroup:
    """What it is trained on. Values are checked by `memrt.data.DataSettings`."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="FILE_OR_HUB_DATASET",
        help="a .txt, .jsonl, .csv, .tsv or .parquet file, or a dataset of the Hub: owner/name or "
        f"owner/name:split (default: {default})",
    )
    group.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="names of all columns of a .csv or .tsv that has no header line",
    )
    group.add_argument(
        "--configuration", metavar="NAME", help="of a dataset of the Hub that has several"
    )
    group.add_argument(
        "--tokenizer",
        metavar="DIR_OR_HUB_ID",
        help="default: the model's; for a config alone, a byte-level BPE of the embedded text",
    )
    group.add_argument(
        "--truncation",
        choices=("error", "cut", "drop"),
        help="for records that are longer than --seq (default: error)",
    )
    for column in ("text", "prompt", "completion", "messages"):
        group.add_argument(
            f"--{column}-column",
            metavar="NAME",
            help=f"the column that is the {column}",
        )
    group.add_argument(
        "--label-column",
        metavar="NAME",
        help="the column that is a classifier's label (default: label)",
    )
    group.add_argument(
        "--text-pair-column", metavar="NAME", help="the column that is the second text of a pair"
    )
    return group


def add_training_flags(parser: argparse.ArgumentParser, *, steps: int, smallest: int) -> None:
    """How a real run trains."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps",
        type=whole_number(smallest),
        default=steps,
        help=f"optimizer steps of a run: 2 under the ledger, 1 to warm up, the rest timed "
        f"(default: {steps})",
    )
    group.add_argument(
        "--lr",
        "--learning-rate",
        dest="learning_rate",
        type=_number(0, float("inf"), low_is_allowed=False),
        default=1e-3,
        help="learning rate of AdamW, constant (default: 1e-3)",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda|cuda:N",
        help="default: auto, which is CUDA where there is one",
    )


def add_report_flags(parser: argparse.ArgumentParser, *, output: str | None) -> None:
    """Where results go."""
    group = parser.add_argument_group("report")
    group.add_argument(
        "--gpu",
        metavar="CARD",
        help="say whether it fits this card: rtx4090, a100-80, h100, l40s, ..., or 24GiB, 80GB",
    )
    group.add_argument(
        "--json", action="store_true", help="print the report as JSON on stdout, and nothing else"
    )
    group.add_argument(
        "--output",
        metavar="DIR",
        default=output,
        help="write report.md, report.html and report.json here"
        + (f" (default: {output})" if output else "")
        + "; an earlier report of the same command is kept as DIR.1, DIR.2, ...",
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="write into DIR even when it holds other files; replaces its report files",
    )
    group.add_argument(
        "--traceback", action="store_true", help="show where an error was raised in the code"
    )
