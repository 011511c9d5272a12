"""Runs an operator with its Triton kernel on the CPU, in Triton's interpreter.

Whether Triton interprets is decided when a kernel is defined, so this takes a process of its own:
`call_interpreted` runs this file there with `TRITON_INTERPRET=1`, which also turns the operator's
dispatch to Triton.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def call_interpreted(operator: str, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Call `operator` ("module:function") with each of `calls`; its arguments as it left them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"operator": operator, "calls": list(calls)}, Path(folder) / "calls.pt")
        done = subprocess.run(
            [sys.executable, __file__, folder],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        left: list[dict[str, Any]] = torch.load(Path(folder) / "left.pt", weights_only=True)
    return left


def main() -> None:
    """Call what `calls.pt` says, and write the arguments afterwards into `left.pt`."""
    folder = Path(sys.argv[1])
    request = torch.load(folder / "calls.pt", weights_only=True)
    module, _, name = request["operator"].partition(":")
    operator = getattr(import_module(module), name)
    for arguments in request["calls"]:
        operator(**arguments)
    assert "triton" in sys.modules
    torch.save(request["calls"], folder / "left.pt")


if __name__ == "__main__":
    main()
