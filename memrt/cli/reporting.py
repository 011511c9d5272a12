"""Handing a finished report to the user: on stdout, and into its folder."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from memrt.cli.output import ReportFolder
    from memrt.gpus import Gpu

__all__ = ["add_gpu", "claim_folder", "deliver", "parse_gpu"]


def parse_gpu(arguments: argparse.Namespace) -> Gpu | None:
    """The card of `--gpu`; `ValueError` for a size that is none."""
    from memrt.gpus import Gpu

    return None if arguments.gpu is None else Gpu.parse(arguments.gpu, argument="--gpu")


def claim_folder(arguments: argparse.Namespace, *, kind: str) -> ReportFolder | None:
    """The folder of `--output`, checked before the run begins; None when none was named."""
    from memrt.cli.output import ReportFolder

    if arguments.output is None:
        if arguments.force:
            raise ValueError("--force has no effect without --output; leave it out")
        return None
    return ReportFolder.claim(arguments.output, kind=kind, force=arguments.force)


def add_gpu(report: dict[str, Any], gpu: Gpu | None) -> None:
    """Add what a device holds beside the tensors, and whether it fits the card."""
    from memrt.gpus import Gpu

    outside = max((each["device"] for each in report.get("outside", {}).values()), default=0)
    peaks = report["rounded_peak_bytes"], report.get("worst_rounded_peak_bytes"), outside
    report["device_bytes"] = Gpu.required_bytes(*peaks)
    report["overheads"] = [asdict(each) for each in Gpu.overheads(*peaks)]
    report["gpu"] = None if gpu is None else gpu.to_json()
    report["fits"] = None if gpu is None else report["device_bytes"]["high"] <= gpu.total_bytes


def deliver(
    report: dict[str, Any], arguments: argparse.Namespace, folder: ReportFolder | None
) -> None:
    """Print and write, in this order, and write even where nobody reads what is printed.

    So neither a full disk nor a closed pipe loses a result.
    """
    from memrt.profiling.render import print_report, to_markdown
    from memrt.profiling.render_html import to_html

    text = json.dumps(report, indent=2, allow_nan=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a Δ
    try:
        if arguments.json:
            print(text)
        else:
            print_report(report)
        sys.stdout.flush()
    finally:
        if folder is not None:
            files = {"report.md": to_markdown(report), "report.html": to_html(report)}
            _write(folder, {**files, "report.json": text + "\n"})


def _write(folder: ReportFolder, files: dict[str, str]) -> None:
    kept = folder.write(files)
    if kept is not None:
        print(f"the earlier report is now {kept}", file=sys.stderr)
    names = ", ".join(str(folder.path / name) for name in files)
    print(f"report: {names}", file=sys.stderr)
