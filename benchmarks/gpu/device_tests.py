"""`pytest -m gpu`: the tests that need a device, from the files that have some."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import PartFile, Setting, parse
from benchmarks.record import ROOT

__all__ = ["main", "rows_of"]

_MARK = "@pytest.mark.gpu"


def _files(setting: Setting) -> list[Path]:
    """Files with a marked test; the tiny scale takes those that import little."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in found if _MARK in path.read_text("utf-8")]
    return [p for p in marked if "profiling" in p.parts] if setting.tiny else marked


def rows_of(report: ElementTree.Element) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and row of every test in a JUnit report."""
    statuses = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    for case in report.iter("testcase"):
        row: dict[str, Any] = {"status": "passed", "reason": None}
        for child in case:
            if child.tag in statuses:
                row = {
                    "status": statuses[child.tag],
                    "reason": (child.get("message") or child.tag).splitlines()[0],
                    "text": (child.text or "")[-4000:],
                }
        yield f"{case.get('classname')}::{case.get('name')}", row


def main(argv: Sequence[str] | None = None) -> int:
    """Fill tests.json."""
    setting = parse(argv, __doc__ or "")
    part = PartFile(setting, "tests")
    files = _files(setting)
    with tempfile.TemporaryDirectory(prefix="memrt-gpu-tests-") as folder:
        path = Path(folder) / "report.xml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"),
                f"--junitxml={path}",
                *map(str, files),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        part.add("exit_code", done.returncode)
        part.add("output", (done.stdout + done.stderr)[-4000:])
        rows = dict(rows_of(ElementTree.parse(path).getroot())) if path.exists() else {}
    for name, row in rows.items():
        part.case(name, row.copy)
    if not rows:
        part.case("pytest", lambda: {"status": "failed", "reason": "pytest wrote no report"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
