"""A line of `memrt doctor`, and trying something in a process of its own.

The standard library alone is imported here, so that it works where PyTorch is not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BROKEN", "LIMIT", "MISSING", "NOTE", "OK", "Finding", "Probe"]

OK, MISSING, BROKEN, LIMIT, NOTE = "ok", "missing", "broken", "limit", "note"

_PROBE_SECONDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: what was looked at, how it is, what was found, and what would change it."""

    topic: str
    name: str
    status: str
    found: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a probe found, or why it failed in one line."""

    values: Mapping[str, Any]
    error: str | None = None

    @property
    def works(self) -> bool:
        """Whether it came to its end."""
        return self.error is None

    @classmethod
    def run(cls, name: str) -> Probe:
        """Run a probe in a process of its own."""
        command = [sys.executable, "-m", "memrt.diagnosis_probes", name]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PROBE_SECONDS,
                check=False,
                env=_environment(),
            )
        except subprocess.TimeoutExpired:
            return cls(values={}, error=f"no answer within {_PROBE_SECONDS} s")
        except OSError as error:
            return cls(values={}, error=f"could not be started: {error}")
        return cls._of(done)

    @classmethod
    def _of(cls, done: subprocess.CompletedProcess[str]) -> Probe:
        if done.returncode < 0:
            return cls(values={}, error=f"killed by signal {-done.returncode}")
        try:
            found = json.loads(done.stdout.strip().rpartition("\n")[2])
        except ValueError:
            found = None
        if done.returncode or not isinstance(found, dict):
            last = done.stderr.strip().rpartition("\n")[2]
            return cls(values={}, error=last[:300] or f"ended with code {done.returncode}")
        return cls(values=found)


def _environment() -> dict[str, str]:
    """The environment of a probe: memrt is found wherever this one was."""
    folder = str(Path(__file__).resolve().parents[1])
    paths = [folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
