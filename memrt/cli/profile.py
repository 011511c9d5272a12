"""`memrt profile`: a real run, with every number from every source side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from memrt.cli.arguments import (
    STACK_HELP,
    add_command,
    add_data_flags,
    add_model_flags,
    add_report_flags,
    add_training_flags,
)

if TYPE_CHECKING:
    from memrt.cli.model import Model
    from memrt.measure import Workload
    from memrt.monitoring import PhaseMarks
    from memrt.profiling.monitor import MonitorReport
    from memrt.profiling.snapshot import AllocatorHistory

__all__ = ["add_parser", "run"]

_STEPS = 10
_SMALLEST_STEPS = 4  # memrt.measure.MIN_STEPS, which would import torch

_DESCRIPTION = f"""\
Train for a few real steps and show what was predicted (memrt plan), what the ledger counted, what
torch's allocator and what the driver (NVML) saw. Without a GPU the last two are host memory (RSS),
and the report says so. The first 2 steps run under the ledger, the rest under a light monitor.

  memrt profile --model ./my-model --data my.jsonl --strategies galore activation_checkpoint

All words after --strategies form ONE stack.
{STACK_HELP}"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "profile",
        summary="a real run: predicted, counted, allocator and driver side by side",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--strategies", nargs="+", default=["none"], metavar="STRATEGY", help="one stack"
    )
    add_model_flags(parser)
    add_data_flags(parser, default="the language reference that CPython carries")
    add_training_flags(parser, steps=_STEPS, smallest=_SMALLEST_STEPS)
    parser.add_argument(
        "--kernel-scratch",
        action="store_true",
        help="also run one step under torch's profiler and report the most that an operator "
        "allocates and frees inside itself, which no ledger sees (CPU only)",
    )
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="also train the stack without each of its strategies, and show what every one saves "
        "beside what memrt plan --waterfall predicts; every run starts from the same weights and "
        "sees the same batches",
    )
    add_report_flags(parser, output=None)


def run(arguments: argparse.Namespace) -> int:
    """Plan, run, print."""
    from memrt.cli.batches import require_data
    from memrt.cli.model import Model
    from memrt.cli.progress import Progress
    from memrt.cli.reporting import add_gpu, claim_folder, deliver, parse_gpu
    from memrt.cli.stacks import parse_stack
    from memrt.cli.workload import workload_for
    from memrt.profiling.snapshot import AllocatorHistory

    gpu = parse_gpu(arguments)
    folder = claim_folder(arguments, kind="profile")
    stack = parse_stack(arguments.strategies)
    if arguments.ablate and not stack.strategies:
        raise ValueError("--ablate has no effect without --strategies; leave it out")
    require_data(arguments)
    progress = Progress()
    model = Model.resolve(arguments, progress)
    model, workload = workload_for(arguments, model, progress)
    if arguments.kernel_scratch and workload.device.type != "cpu":
        raise ValueError(
            "--kernel-scratch is for CPU runs; on CUDA the allocator's own peak holds it: leave "
            "it out"
        )
    progress.say("planning the same run on fake tensors")
    prediction = _prediction(arguments, model, stack.strategies, workload)
    if prediction["not_predicted"] is not None:
        progress.say(f"no prediction: {prediction['not_predicted']}")
    history = AllocatorHistory(
        workload.device, unavailable=None if folder else "no folder was named with --output"
    )
    report = _profiled(workload, stack, progress, history)
    report |= prediction
    report["kernel_scratch"] = None
    if arguments.kernel_scratch:
        report["kernel_scratch"] = _kernel_scratch(workload, stack.strategies)
    report["ablation"] = None
    if arguments.ablate:
        report["ablation"] = _ablation(arguments, model, stack, workload, progress)
    add_gpu(report, gpu)
    deliver(report, arguments, folder)
    if folder is not None:
        history.write(folder.path)
    return 0


def _prediction(
    arguments: argparse.Namespace, model: Model, strategies: Any, workload: Workload
) -> dict[str, Any]:
    """`predicted`, or None and the reason in `not_predicted`: such a model runs all the same."""
    from memrt.profiling.fake import NotPlannableError

    try:
        predicted = _predicted(arguments, model, strategies, workload)
    except NotPlannableError as error:
        return {"predicted": None, "not_predicted": str(error)}
    return {"predicted": predicted, "not_predicted": None}


def _predicted(
    arguments: argparse.Namespace, model: Model, strategies: Any, workload: Workload
) -> dict[str, Any]:
    from memrt.cli.plan import plan_report

    report = plan_report(arguments, model, list(strategies), workload.windows[0])
    del report["conditions"]  # the run's own
    return report


def _ablation(
    arguments: argparse.Namespace, model: Model, stack: Any, workload: Workload, progress: Any
) -> list[dict[str, Any]]:
    from memrt.cli.ablation import ablation

    def planned_peak_of(strategies: list[Any]) -> int:
        progress.say(f"planning {'+'.join(map(str, strategies)) or 'none'}")
        peak: int = _predicted(arguments, model, strategies, workload)["peak_bytes"]
        return peak

    return ablation(stack.strategies, workload, planned_peak_of, progress.say)


def _profiled(
    workload: Workload, stack: Any, progress: Any, history: AllocatorHistory
) -> dict[str, Any]:
    import torch

    from memrt.measure import measure
    from memrt.monitoring import PhaseMarks
    from memrt.profiling.monitor import Monitor

    # None: the monitor finds that there is no GPU, and says so
    monitor = Monitor(device=workload.device if torch.cuda.is_available() else None)
    marks = PhaseMarks(monitor, history=history)
    going = progress.task(f"training {stack.label}", num_steps=len(workload.windows))
    with monitor, history, going as go:
        measured = measure(workload, stack.strategies, marks=marks, on_step=go)
    watched = monitor.report()
    return {
        **measured,
        "kind": "profile",
        "stack": stack.label,
        "snapshot": history.to_json(),
        "monitor": watched.to_json(),
        "joules_per_token": _joules_per_token(watched, marks, workload),
    }


def _joules_per_token(
    watched: MonitorReport, marks: PhaseMarks, workload: Workload
) -> float | None:
    """Energy of the steps without the ledger, over their tokens."""
    from memrt.measure import LEDGER_STEPS, num_tokens

    before = marks.before_steps
    if watched.energy_joules is None or before is None or before.energy_joules is None:
        return None
    tokens = sum(map(num_tokens, workload.windows[LEDGER_STEPS:]))
    return (watched.energy_joules - before.energy_joules) / tokens


def _kernel_scratch(workload: Workload, strategies: Any) -> dict[str, Any]:
    import torch

    from memrt.profiling.kernel_scratch import largest_scratch
    from memrt.runner import copied, start, train_step

    torch.manual_seed(workload.settings.seed)
    model = workload.fresh_model(strategies)
    (probe,) = copied(workload.windows[0][:1], workload.device)
    run = start(model, strategies, settings=workload.settings, probe=probe)
    train_step(run, workload.windows[0])  # the optimizer's state is there from now on
    found = largest_scratch(lambda: train_step(run, workload.windows[1]))
    run.session.detach()
    return found
