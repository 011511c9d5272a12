"""`memrt doctor`: what works on this machine, what does not, why, and what to install."""

from __future__ import annotations

import argparse
import io
import json
import sys
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any

from memrt.cli.arguments import add_command

if TYPE_CHECKING:
    from memrt.diagnosis import Diagnosis
    from memrt.profiling.render import Section

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Look at packages, kernels, GPU and driver, memory and lock limits, disks, and try one real training
step on every device. Whatever is broken is a line with its reason and what to do about it.

Exit codes: 0 a training step works, 1 it does not.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "doctor",
        summary="what works on this machine, and what to install",
        description=_DESCRIPTION,
    )
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error was raised in the code"
    )


def run(arguments: argparse.Namespace) -> int:
    """Look, print; the exit code is about training alone."""
    from memrt.diagnosis import diagnose
    from memrt.profiling.render import print_sections, sections_to_markdown

    if sys.stderr.isatty():
        print("trying packages, kernels and a training step; some seconds", file=sys.stderr)
    found = diagnose()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    elif sys.stdout.isatty() and find_spec("rich") is not None:
        print_sections(_sections(found))
    else:
        sys.stdout.write(sections_to_markdown(_sections(found)))
    return 0 if found.trains else 1


def _sections(found: Diagnosis) -> list[Section]:
    from memrt.profiling.render import Column, Section, Table

    works = "Training works here." if found.trains else "Training does not work here."
    sections = [Section(title="memrt doctor", before=[works])]
    columns = [Column(title="what"), Column(title="is"), Column(title="found")]
    for topic, findings in groupby(found.findings, key=lambda finding: finding.topic):
        rows = [[each.name, each.status, each.found] for each in findings]
        table = Table(columns=columns, rows=rows)
        sections.append(Section(title=topic[0].upper() + topic[1:], table=table))
    to_do = [f"- {each.name}: {each.remedy}" for each in found.findings if each.remedy is not None]
    if to_do:
        sections.append(Section(title="What can be done", before=["\n".join(to_do)]))
    return sections
