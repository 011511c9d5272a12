"""Runs Python in a process whose NVIDIA driver library is a stand-in, loaded as pynvml loads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Protocol

import pytest

SOURCE = Path(__file__).with_name("nvml_standin.c")
ROOT = Path(__file__).parents[2]

PROLOGUE = """
import ctypes, json
from memrt.profiling.nvml import DeviceAddress, Nvml, NvmlUnavailable
_standin = None
def set_value(name, value):
    global _standin
    _standin = _standin or ctypes.CDLL("libnvidia-ml.so.1")
    _standin.nvml_standin_set(name.encode(), ctypes.c_ulonglong(value))
def users():
    return ctypes.CDLL("libnvidia-ml.so.1").nvml_standin_users()
def answer(value):
    print("ANSWER" + json.dumps(value))
"""


class RunWithDriver(Protocol):
    """Runs ``body``, which calls ``answer(value)`` once, and gives that value."""

    def __call__(
        self, body: str, values: dict[str, int] | None = None, *, driver: str = "current"
    ) -> Any: ...


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a libnvidia-ml.so.1: a current driver, one before 510, and none that loads."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("the driver stand-in is C: it needs gcc")
    if not sys.platform.startswith("linux"):
        pytest.skip("the driver stand-in is a Linux shared library")
    folders = {}
    for name, options in (("current", []), ("old", ["-DOLD_DRIVER"])):
        folder = tmp_path_factory.mktemp(f"driver_{name}")
        library = folder / "libnvidia-ml.so.1"
        command = [compiler, "-std=gnu11", "-Wall", "-Werror", "-shared", "-fPIC", *options]
        subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
        folders[name] = folder
    # An empty file stops the loader's search, so a real driver further on is not found either.
    folders["none"] = tmp_path_factory.mktemp("driver_none")
    (folders["none"] / "libnvidia-ml.so.1").touch()
    return folders


@pytest.fixture
def run_with_driver(drivers: dict[str, Path]) -> RunWithDriver:
    """See ``RunWithDriver``. Anything on stderr fails the test."""

    def run(body: str, values: dict[str, int] | None = None, *, driver: str = "current") -> Any:
        environment = dict(os.environ)
        environment["LD_LIBRARY_PATH"] = str(drivers[driver])
        environment["PYTHONPATH"] = str(ROOT)
        pairs = (values or {}).items()
        environment["NVML_STANDIN"] = ";".join(f"{name}={value}" for name, value in pairs)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROLOGUE + textwrap.dedent(body)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
        return json.loads(line.removeprefix("ANSWER"))

    return run
