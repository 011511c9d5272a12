"""`memrt plan`: what a run will need, from a config alone: no weights, no GPU."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memrt.cli.arguments import (
    STACK_HELP,
    add_command,
    add_data_flags,
    add_model_flags,
    add_report_flags,
    whole_number,
)

if TYPE_CHECKING:
    from memrt.advice import Remedy
    from memrt.cli.model import Model
    from memrt.cli.stacks import Stack
    from memrt.gpus import Host
    from memrt.planning import Plan

__all__ = ["DOES_NOT_FIT", "add_parser", "plan_report", "run"]

DOES_NOT_FIT = 2

EMPTY = "none"  # memrt.cli.stacks.EMPTY, which would import torch

_COLUMNS = ("text", "prompt", "completion", "messages", "label", "text_pair")

_DESCRIPTION = f"""\
Predict the memory of a training run: the run itself, on fake tensors, two optimizer steps.

  memrt plan --model meta-llama/Llama-3.1-8B --strategies galore fused_loss --gpu 24GiB

All words after --strategies form ONE stack.
{STACK_HELP}
  memrt plan --model answerdotai/ModernBERT-base --task sequence-classification --labels 5

A plan is of what the config names, or of --task. Of classifiers too; --data has their labels.

  memrt plan --model meta-llama/Llama-3.1-8B --seq 2048 --batch 1 --auto --gpu rtx4090

--auto adds strategies until it fits: first those that keep the numbers of training, then smaller
optimizer state, then updates in backward, then part of the layers at a time, at last what changes
what is trained (low rank, adapters, a side network), unless --full-parameters. What is named after
--strategies stays. Without --auto, a plan that does not fit says what to change.
Exit codes: 0 it fits (or neither --gpu nor --host was named), 2 it does not fit, 1 error.
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
    data = add_data_flags(parser, default="random ids of --batch and --seq")
    data.add_argument(
        "--labels",
        type=whole_number(1),
        metavar="N",
        help="classes of a classifier's new head, without --data (default: the config's)",
    )
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
    _add_fitting_flags(parser)
    add_report_flags(parser, output=None)


def _add_fitting_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fitting")
    group.add_argument(
        "--host",
        metavar="SIZE",
        help="say whether what waits on the host fits in so much host memory: 64GiB, 64GB",
    )
    group.add_argument(
        "--auto", action="store_true", help="choose the strategies so that it fits --gpu"
    )
    group.add_argument(
        "--full-parameters",
        action="store_true",
        help="with --auto: nothing that changes what is trained",
    )
    group.add_argument(
        "--no-advice",
        action="store_true",
        help="when it does not fit, do not plan what to change (at most 6 more plans)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Plan, print, and say by the exit code whether it fits."""
    from memrt.cli.batches import batches_for, require_data
    from memrt.cli.model import Model
    from memrt.cli.progress import Progress
    from memrt.cli.reporting import add_gpu, claim_folder, deliver, parse_gpu
    from memrt.cli.stacks import parse_stack

    _refuse_flags_without_effect(arguments)
    gpu = parse_gpu(arguments)
    host = None if arguments.host is None else _host(arguments.host)
    folder = claim_folder(arguments, kind="plan")
    stack = parse_stack(arguments.strategies)
    if arguments.waterfall and not (stack.strategies or arguments.auto):
        raise ValueError("--waterfall has no effect without --strategies; leave it out")
    require_data(arguments)
    progress = Progress()
    model = Model.resolve(arguments, progress)
    window = None
    if arguments.data is not None:
        model, batches = batches_for(arguments, model, progress, num_steps=1)
        window = batches.windows[0]
    planner = Planner(arguments=arguments, model=model, window=window, progress=progress)
    report = planner.auto(stack) if arguments.auto else planner.report(stack)
    add_gpu(report, gpu)
    _add_host(report, host)
    report["waterfall"] = None
    if arguments.waterfall:
        if arguments.auto:
            stack = parse_stack([report["stack"]])
        report["waterfall"] = _waterfall(arguments, model, stack, window, progress)
    deliver(report, arguments, folder)
    return DOES_NOT_FIT if report["fits"] is False else 0


def _host(text: str) -> Host:
    from memrt.gpus import Host

    try:
        return Host.parse(text)
    except ValueError as error:
        raise ValueError(str(error).replace("host=", "--host ", 1)) from None


def _add_host(report: dict[str, Any], host: Host | None) -> None:
    """Whether the host has what waits there."""
    report["host"] = report["fits_host"] = None
    if host is not None:
        report["host"] = host.to_json()
        report["fits_host"] = report["host_bytes"]["pinned"] <= host.total_bytes
        report["fits"] = report["fits_host"] and report["fits"] is not False


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Plans of one command line."""

    arguments: argparse.Namespace
    model: Model
    window: Any
    progress: Any

    def report(self, stack: Stack) -> dict[str, Any]:
        """The plan of the stack that was named, and what to change if it does not fit."""
        planned = self._planned(stack.strategies)
        report = _as_report(planned, self.arguments, self.model)
        report["stack"] = stack.label
        report["auto"] = report["advice"] = None
        if planned.fits is False and not self.arguments.no_advice:
            report["advice"] = [each.to_json() for each in self._advice(planned, stack)]
        return report

    def auto(self, stack: Stack) -> dict[str, Any]:
        """The plan of the stack that is chosen to fit."""
        from memrt.auto import choose

        choice = choose(
            self.model.config,
            stack.strategies,
            budget=self.arguments.gpu,
            host=self.arguments.host,
            full_parameters=self.arguments.full_parameters,
            on_plan=lambda label: self.progress.say(f"planning {label}"),
            **_plan_options(self.arguments, self.model, self.window),
        )
        report = _as_report(choice.plan, self.arguments, self.model)
        report["stack"] = "+".join(choice.strategies) or EMPTY
        report["auto"], report["advice"] = choice.to_json(), None
        return report

    def _advice(self, planned: Plan, stack: Stack) -> list[Remedy]:
        from memrt.advice import advise
        from memrt.auto import hidden_size_of

        def plan_of(strategies: Any, **changed: int) -> Plan:
            self.progress.say(f"planning {'+'.join(map(str, strategies)) or EMPTY}")
            return self._planned(strategies, **changed)

        return advise(
            planned,
            stack.strategies,
            plan_of,
            hidden_size=hidden_size_of(self.model.config),
            max_grad_norm=self.arguments.max_grad_norm,
            shapes_are_free=self.window is None,
        )

    def _planned(self, strategies: Any, **changed: int) -> Plan:
        from memrt.planning import plan

        options = {**_plan_options(self.arguments, self.model, self.window), **changed}
        return plan(
            self.model.config,
            strategies,
            gpu=self.arguments.gpu,
            host=self.arguments.host,
            full=self.arguments.full,
            **options,
        )


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

    full = getattr(arguments, "full", False)
    options = _plan_options(arguments, model, window)
    return _as_report(plan(model.config, strategies, full=full, **options), arguments, model)


def _plan_options(arguments: argparse.Namespace, model: Model, window: Any) -> dict[str, Any]:
    batch_size, sequence_length = arguments.batch_size, arguments.sequence_length
    if window is not None:
        batch_size, sequence_length = window[0]["input_ids"].shape
    return {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "accumulation_steps": arguments.accumulation_steps,
        "dtype": model.dtype,
        "max_grad_norm": arguments.max_grad_norm,
        "window": window,
    }


def _as_report(planned: Plan, arguments: argparse.Namespace, model: Model) -> dict[str, Any]:
    report = planned.to_json()
    report["conditions"]["model"] = model.name
    without = "random ids" if hasattr(model.config, "vocab_size") else "blank images"
    report["conditions"]["data"] = arguments.data or without
    report["conditions"]["task"] = model.task
    return report


def _refuse_flags_without_effect(arguments: argparse.Namespace) -> None:
    if arguments.auto and arguments.gpu is None:
        raise ValueError("--auto needs what it is to fit: add --gpu CARD, or a size as 24GiB")
    if arguments.auto and arguments.full:
        raise ValueError("--full has no effect with --auto; plan the stack that it chose")
    if arguments.full_parameters and not arguments.auto:
        raise ValueError("--full-parameters has no effect without --auto; leave it out")
    if arguments.no_advice and (arguments.auto or not (arguments.gpu or arguments.host)):
        raise ValueError(
            "--no-advice is for a stack that --gpu or --host may not hold; leave it out"
        )
    if arguments.data is not None:
        if arguments.labels is not None:
            raise ValueError(
                f"--labels {arguments.labels}: the classes are those of --data; leave it out"
            )
        return
    names = (
        "tokenizer",
        "truncation",
        "columns",
        "configuration",
        *(f"{c}_column" for c in _COLUMNS),
    )
    for name in names:
        if getattr(arguments, name, None) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} has no effect without --data; leave it out")
