"""`memrt plan`: what a run will need, from a config alone: no weights, no GPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from memrt.cli.arguments import (
    STACK_HELP,
    add_command,
    add_data_flags,
    add_model_flags,
    add_report_flags,
)

if TYPE_CHECKING:
    from memrt.cli.model import Model

__all__ = ["DOES_NOT_FIT", "add_parser", "run"]

DOES_NOT_FIT = 2

_COLUMNS = ("text", "prompt", "completion", "messages")

_DESCRIPTION = f"""\
Predict the memory of a training run: the run itself, on fake tensors, two optimizer steps.

  memrt plan --model meta-llama/Llama-3.1-8B --strategies galore fused_loss --gpu 24GiB

All words after --strategies form ONE stack.
{STACK_HELP}
Exit codes: 0 it fits (or no --gpu was named), 2 it does not fit, 1 error.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "plan",
        summary="what a run will need, on fake tensors",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--strategies", nargs="+", default=["none"], metavar="STRATEGY", help="one stack"
    )
    add_model_flags(parser)
    add_data_flags(parser, default="random ids of --batch and --seq")
    parser.add_argument(
        "--full",
        action="store_true",
        help="simulate every layer instead of three small depths that are carried to full depth",
    )
    parser.add_argument(
        "--waterfall",
        action="store_true",
        help="also plan the stack without each of its strategies, and say what every one saves",
    )
    add_report_flags(parser, output=None)


def run(arguments: argparse.Namespace) -> int:
    """Plan, print, and say by the exit code whether it fits."""
    from memrt.cli.batches import batches_for
    from memrt.cli.model import Model
    from memrt.cli.progress import Progress
    from memrt.cli.reporting import add_gpu, claim_folder, deliver, parse_gpu
    from memrt.cli.stacks import parse_stack

    _refuse_data_flags_without_data(arguments)
    gpu = parse_gpu(arguments)
    folder = claim_folder(arguments, kind="plan")
    stack = parse_stack(arguments.strategies)
    progress = Progress()
    model = Model.resolve(arguments, progress)
    window = None
    if arguments.data is not None:
        window = batches_for(arguments, model, progress, num_steps=1).windows[0]
    if arguments.waterfall and not stack.strategies:
        raise ValueError("--waterfall has no effect without --strategies; leave it out")
    report = plan_report(arguments, model, list(stack.strategies), window)
    report["stack"] = stack.label
    add_gpu(report, gpu)
    report["waterfall"] = None
    if arguments.waterfall:
        report["waterfall"] = _waterfall(arguments, model, stack, window, progress)
    deliver(report, arguments, folder)
    return DOES_NOT_FIT if report["fits"] is False else 0


def _waterfall(
    arguments: argparse.Namespace, model: Model, stack: Any, window: Any, progress: Any
) -> list[dict[str, Any]]:
    from memrt.waterfall import waterfall

    def peak_of(strategies: list[Any]) -> int:
        label = "+".join(map(str, strategies)) or "none"
        progress.say(f"planning {label}")
        peak: int = plan_report(arguments, model, strategies, window)["peak_bytes"]
        return peak

    return waterfall(stack.strategies, peak_of)


def plan_report(
    arguments: argparse.Namespace, model: Model, strategies: list[Any], window: Any = None
) -> dict[str, Any]:
    """The plan of a run whose optimizer steps train `window`; None: random ids."""
    from memrt.planning import plan

    batch_size, sequence_length = arguments.batch_size, arguments.sequence_length
    if window is not None:
        batch_size, sequence_length = window[0]["input_ids"].shape
    planned = plan(
        model.config,
        strategies,
        batch_size=batch_size,
        sequence_length=sequence_length,
        accumulation_steps=arguments.accumulation_steps,
        dtype=model.dtype,
        max_grad_norm=arguments.max_grad_norm,
        full=getattr(arguments, "full", False),
        window=window,
    )
    report = planned.to_json()
    report["conditions"]["model"] = model.name
    report["conditions"]["data"] = arguments.data or "random ids"
    return report


def _refuse_data_flags_without_data(arguments: argparse.Namespace) -> None:
    if arguments.data is not None:
        return
    names = ("tokenizer", "truncation", *(f"{c}_column" for c in _COLUMNS))
    for name in names:
        if getattr(arguments, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} has no effect without --data; leave it out")
