"""`memrt compare`: one model, one text, a list of strategy stacks, one table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memrt.cli.arguments import (
    STACK_HELP,
    add_command,
    add_data_flags,
    add_model_flags,
    add_report_flags,
    add_training_flags,
    fraction,
)

if TYPE_CHECKING:
    from memrt.cli.model import Model
    from memrt.cli.output import ReportFolder
    from memrt.cli.progress import Progress
    from memrt.cli.stacks import Stack
    from memrt.measure import Workload

__all__ = ["DEFAULT_STACKS", "add_parser", "run"]

DEFAULT_STACKS = (
    "none",
    "activation_checkpoint",
    "offload_activations",
    "fused_loss",
    "lisa",
    "int8_states",
    "galore(rank=64)",
    "lisa+int8_states",
    "activation_checkpoint+galore(rank=64)+int8_states+fused_loss",
)

_STEPS = 12
_EVALUATION_FRACTION = 0.05
_SMALLEST_STEPS = 4  # memrt.measure.MIN_STEPS, which would import torch

_DESCRIPTION = f"""\
Fine-tune one model on one text under a list of strategy stacks, one after the other from the same
weights and on the same batches, and print one table.

  memrt compare
  memrt compare --model ./my-model --data my.jsonl --strategies none "galore(rank=64)+fused_loss"

Each word after --strategies is a stack of its own.
{STACK_HELP}
A stack that cannot run is reported with its reason and the others go on; the exit code is 0 when
every stack ran, else 1.
"""

_MEASURED = (
    "peak_bytes",
    "accounts",
    "places",
    "owners",
    "phases",
    "place_peaks",
    "account_maxima",
    "tokens_per_second",
    "loss",
    "evaluation_loss",
)
"""Keys that are null in the row of a stack that did not run."""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "compare",
        summary="train one model under several stacks, print one table",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        metavar="STACK",
        help=f"default: {' '.join(DEFAULT_STACKS)}",
    )
    add_model_flags(parser)
    data = add_data_flags(parser, default="the language reference that CPython carries")
    data.add_argument(
        "--evaluation-data", metavar="FILE", help="held-out data for the held-out loss"
    )
    data.add_argument(
        "--evaluation-fraction",
        type=fraction,
        metavar="F",
        help="without --evaluation-data: the part of the data that is held out, 0 for none "
        f"(default: {_EVALUATION_FRACTION}); two batches of it are evaluated",
    )
    add_training_flags(parser, steps=_STEPS, smallest=_SMALLEST_STEPS)
    add_report_flags(parser, output="memrt-report")


def run(arguments: argparse.Namespace) -> int:
    """Run every stack, print the table, write the report."""
    from memrt.cli.batches import require_data
    from memrt.cli.model import Model
    from memrt.cli.progress import Progress
    from memrt.cli.reporting import claim_folder, parse_gpu
    from memrt.cli.stacks import parse_stacks
    from memrt.cli.workload import workload_for

    parse_gpu(arguments)
    folder = claim_folder(arguments, kind="compare")
    stacks = parse_stacks(arguments.strategies or DEFAULT_STACKS)
    require_data(arguments)
    progress = Progress()
    model = Model.resolve(arguments, progress)
    if arguments.evaluation_fraction is None:
        arguments.evaluation_fraction = 0 if arguments.evaluation_data else _EVALUATION_FRACTION
    model, workload = workload_for(arguments, model, progress)
    refused = _refusals(stacks, model, workload)
    if len(refused) == len(stacks):
        raise ValueError("\n".join(f"{label}: {reason}" for label, reason in refused.items()))
    for label, reason in refused.items():
        progress.say(f"{label}: refused: {reason}")
    runs: list[dict[str, Any]] = []
    try:
        for index, stack in enumerate(stacks):
            if stack.label in refused:
                runs.append(_absent(stack, "refused", refused[stack.label]))
            else:
                name = f"{index + 1}/{len(stacks)} {stack.label}"
                runs.append(_measure(stack, workload, progress, name))
    except KeyboardInterrupt:
        # what is measured is kept; the rest is named
        for stack in stacks[len(runs) :]:
            runs.append(_absent(stack, "interrupted", "Ctrl-C"))
        if any(each["status"] == "ok" for each in runs):
            _finish(arguments, runs, folder)
        raise
    if not any(each["status"] == "ok" for each in runs):
        raise ValueError("no stack ran; the reasons are above")
    _finish(arguments, runs, folder)
    return 0 if all(each["status"] == "ok" for each in runs) else 1


def _refusals(stacks: Sequence[Stack], model: Model, workload: Workload) -> dict[str, str]:
    """Why stacks cannot run on this model, found on fake tensors before the first one runs."""
    from memrt.compose import conflicts
    from memrt.profiling.fake import fake_tensors
    from memrt.structure import Facts, discover

    with fake_tensors():
        fake = model.load_fake()
        facts = Facts(model=fake, structure=discover(fake), settings=workload.settings)
        found = {stack.label: conflicts(stack.strategies, facts) for stack in stacks}
    return {label: "; ".join(problems) for label, problems in found.items() if problems}


def _measure(stack: Stack, workload: Workload, progress: Progress, name: str) -> dict[str, Any]:
    """One stack; a run that fails is a row with its reason."""
    from memrt.errors import NonFiniteGradientError, NonFiniteLossError
    from memrt.measure import measure

    began = time.perf_counter()
    try:
        with progress.task(name, num_steps=len(workload.windows)) as advance:
            measured = measure(workload, stack.strategies, on_step=advance)
    except (ValueError, MemoryError, NonFiniteLossError, NonFiniteGradientError) as error:
        progress.say(f"{name}: failed: {error}")
        return _absent(stack, "failed", str(error))
    measured.pop("timeline")  # 500 points a stack, which nobody reads in a comparison
    seconds = time.perf_counter() - began
    return {**measured, "stack": stack.label, "status": "ok", "reason": None, "seconds": seconds}


def _absent(stack: Stack, status: str, reason: str) -> dict[str, Any]:
    return {**dict.fromkeys(_MEASURED), "stack": stack.label, "status": status, "reason": reason}


def _finish(
    arguments: argparse.Namespace, runs: list[dict[str, Any]], folder: ReportFolder | None
) -> None:
    from memrt.cli.reporting import add_gpu, deliver, parse_gpu
    from memrt.measure import LEDGER_STEPS, LOSS_STEPS, WARM_UP_STEPS
    from memrt.profiling.report import SCHEMA

    gpu = parse_gpu(arguments)
    done = [each for each in runs if each["status"] == "ok"]
    for each in done:
        add_gpu(each, gpu)
    shared = {
        **done[0]["conditions"],
        "strategies": [each["stack"] for each in runs],
        "ledger_steps": LEDGER_STEPS,
        "warm_up_steps": WARM_UP_STEPS,
        "loss_steps": LOSS_STEPS,
    }
    report = {
        "schema": SCHEMA,
        "kind": "compare",
        "gpu": None if gpu is None else gpu.to_json(),
        "conditions": shared,
        "runs": runs,
    }
    deliver(report, arguments, folder)
