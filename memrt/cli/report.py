"""`memrt report RUN`: a finished run's report again, as Markdown, JSON, HTML page or PNG."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memrt.cli.arguments import add_command

__all__ = ["FORMATS", "add_parser", "find_report", "read_report", "run"]

FORMATS = ("md", "json", "html", "png")

_NAME = "report.json"
_SCHEMA = "memrt.report/"
_VERSION = 1
_MISSING = (KeyError, TypeError, IndexError, AttributeError, AssertionError)
"""What rendering raises where a report is cut or was changed by hand."""

_DESCRIPTION = """\
Show the report of a finished run again, and write it in other forms: report.md, report.html (one
self-contained page, light and dark) and report.png (with matplotlib), all from its report.json.

  memrt report memrt-report                       everything, beside the report.json
  memrt report run/ --format html --output for-the-wiki

RUN is a folder of memrt compare, plan, profile or train, or its report.json.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "report",
        summary="a finished run's report as Markdown, JSON, HTML page or PNG",
        description=_DESCRIPTION,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its report.json")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        metavar="FORMAT",
        help="md, json, html, png (default: md and html, and png where matplotlib is installed)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="write here (default: beside the report.json)"
    )
    parser.add_argument("--dark", action="store_true", help="the PNG on a dark ground")
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON on stdout, and nothing else"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace files in DIR that are of no report"
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error was raised in the code"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read, render everything, then print and write."""
    from memrt.profiling.render import print_report
    from memrt.profiling.render_png import can_draw

    path = find_report(Path(arguments.run))
    report = read_report(path)
    formats = arguments.format or ["md", "html", *(["png"] if can_draw() else [])]
    if arguments.dark and "png" not in formats:
        raise ValueError("--dark has no effect without a PNG; leave it out, or add --format png")
    if arguments.force and arguments.output is None:
        raise ValueError("--force has no effect without --output; leave it out")
    folder = path.parent if arguments.output is None else Path(arguments.output)
    if folder.resolve() == path.parent.resolve():
        formats = [name for name in formats if name != "json"]  # it is what is read
    else:
        _require_free(folder, formats, force=arguments.force)
    try:
        files = {f"report.{name}": _rendered(report, name, arguments.dark) for name in formats}
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        if arguments.json:
            print(json.dumps(report, indent=2))
        else:
            print_report(report)
    except _MISSING as error:
        raise ValueError(
            f"{path}: the report is not whole ({type(error).__name__}: {error}); run the command "
            "that wrote it again"
        ) from error
    _write(folder, files)
    return 0


def find_report(path: Path) -> Path:
    """The report.json of a run's folder, of one that `memrt train` wrote, or itself."""
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"RUN={str(path)!r}: there is no such file or folder")
    for found in (path / _NAME, path / "memrt" / _NAME):
        if found.is_file():
            return found
    raise ValueError(
        f"RUN={str(path)!r}: the folder holds no {_NAME}, nor does its memrt folder; name a run of "
        "memrt compare, plan or profile --output, or of memrt train with memory_report"
    )


def read_report(path: Path) -> dict[str, Any]:
    """The JSON of a report; `ValueError` for anything else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no report: it is not JSON ({error})") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if not isinstance(schema, str) or not schema.startswith(_SCHEMA):
        raise ValueError(f"{path} is no report of memrt: its schema is {schema!r}")
    version = schema.removeprefix(_SCHEMA)
    if not version.isdigit() or int(version) > _VERSION:
        raise ValueError(
            f"{path} has schema {schema!r}, which is newer than this memrt reads "
            f"({_SCHEMA}{_VERSION}); update memrt"
        )
    assert isinstance(report, dict)
    return report


def _rendered(report: Mapping[str, Any], name: str, dark: bool) -> bytes:
    from memrt.profiling.render import to_markdown
    from memrt.profiling.render_html import to_html
    from memrt.profiling.render_png import to_png

    if name == "png":
        return to_png(report, dark=dark)
    if name == "json":
        return (json.dumps(report, indent=2) + "\n").encode()
    text = to_markdown(report) if name == "md" else to_html(report)
    return text.encode("utf-8", errors="replace")


def _require_free(folder: Path, formats: list[str], *, force: bool) -> None:
    """Refuse to write over what is no report, before anything is printed."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: this is a file; name a folder")
    taken = [f"report.{name}" for name in formats if (folder / f"report.{name}").exists()]
    if taken and not (folder / _NAME).is_file() and not force:
        raise ValueError(
            f"--output {folder}: it holds {', '.join(taken)} of something else; name another "
            "folder, or pass --force to replace them"
        )


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    from memrt.profiling.whole_file import write_whole

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
    except OSError as error:
        raise OSError(
            f"the report could not be written to {folder} ({error.strerror or error}); free "
            "space, or name another folder with --output"
        ) from error
    names = ", ".join(str(folder / name) for name in files)
    if names:
        print(f"report: {names}", file=sys.stderr)
