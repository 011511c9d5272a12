"""`pytest -m gpu`: the tests that need a device, each with a row from the moment that it ends.

pytest runs in this process, with a plugin that writes the rows; a test that crashes the process or
hangs costs its own row, and the process that comes next leaves out what has one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.common import PartFile, Setting, parse
from benchmarks.record import ROOT

__all__ = ["main", "run"]

CASE_SECONDS = 60.0
_MARK = "@pytest.mark.gpu"
_BROKEN = (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)


def _files(setting: Setting) -> list[Path]:
    """Files with a marked test; the tiny scale takes those that import little."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in found if _MARK in path.read_text("utf-8")]
    return [p for p in marked if "profiling" in p.parts] if setting.tiny else marked


class _Rows:
    """A plugin that makes every test a row."""

    def __init__(self, part: PartFile) -> None:
        self._part = part
        self._row: dict[str, Any] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._part.begin(report.nodeid)
            self._part.end(report.nodeid, _failed(str(report.longrepr)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self._row = {"status": "passed", "reason": None}
        self._part.begin(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Its set-up, itself, or what it tidies up."""
        if report.failed:
            self._row = _failed(str(report.longrepr))
        elif report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self._row = {"status": "skipped", "reason": reason}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test is over."""
        self._part.end(nodeid, self._row)


def _failed(text: str) -> dict[str, Any]:
    """The last error line tells most."""
    lines = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()
    return {
        "status": "failed",
        "reason": (lines or ["no report"])[0].removeprefix("E").strip(),
        "text": text[-4000:],
    }


def _arguments(part: PartFile, files: Sequence[Path]) -> Iterator[str]:
    yield from ("-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    for known in part.rows:
        yield f"--deselect={known}"
    yield from map(str, files)


def run(part: PartFile, files: Sequence[Path]) -> None:
    """Run what has no row yet, one test after another: the card is one, and so is the row."""
    os.environ.pop("PYTEST_ADDOPTS", None)  # may ask for several processes
    code = pytest.main([*_arguments(part, files)], plugins=[_Rows(part)])
    part.add("exit_code", int(code))
    if code in _BROKEN or not part.rows:
        part.case("pytest", lambda: {"status": "failed", "reason": f"pytest ended with {code!r}"})


def main(argv: Sequence[str] | None = None) -> int:
    """Fill tests.json."""
    setting = parse(argv, __doc__ or "")
    run(PartFile(setting, "tests", case_seconds=CASE_SECONDS), _files(setting))
    return 0


if __name__ == "__main__":
    sys.exit(main())
