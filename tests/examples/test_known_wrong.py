"""The page about other stacks: every row has a script and a test that exist, and is still true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/known-wrong-elsewhere.md"
SCRIPTS = sorted(
    path for path in (ROOT / "examples/known_wrong").glob("*.py") if path.stem != "common"
)
ELSEWHERE = {"apollo_resume"}
"""Scripts whose packages do not come with `memrt[test]`."""


def test_every_script_has_a_row_and_every_row_names_what_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if "](../examples/known_wrong/" in line]
    linked = [re.findall(r"\]\((\.\./examples/known_wrong/\S+\.py)\)", row) for row in rows]
    assert sorted((PAGE.parent / path).resolve() for (path,) in linked) == SCRIPTS
    tests = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", text)
    assert len(tests) >= len(rows) - 1
    for path, name in tests:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.stem not in ELSEWHERE], ids=lambda s: s.stem
)
def test_it_is_still_wrong(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    if done.returncode == 2:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode in (0, 3), done.stderr
    assert done.returncode == 0, f"gone, take it off {PAGE.name}: {done.stdout}"
    assert done.stdout.strip().endswith("STILL THERE")
