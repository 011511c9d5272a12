"""Compiles Triton kernels ahead of time for GPUs that this machine does not have.

`compile_ahead` asks a process that runs this file, where Triton is not interpreting, and gives
for every architecture what ptxas says of the kernel: registers a thread, bytes spilled to memory,
shared memory, and the machine's instructions. All tests of a process ask the same one, for the
imports take longer than a compilation.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 89, 90, 100)
SHARED_LIMIT_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""The most that a block may have (CUDA C++ Programming Guide, technical specifications)."""
_MOST_SECONDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one kernel takes on one architecture."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    num_instructions: int


def compile_ahead(
    kernel: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    **options: Any,
) -> dict[int, Resources]:
    """Compile `kernel` ("module:function") for `ARCHITECTURES`.

    `signature`: Triton's type of every argument that is not constant, in order ("*bf16", "i32").
    Pointers are taken to be aligned to 16 bytes, as PyTorch's are.
    """
    request = {
        "kernel": kernel,
        "signature": dict(signature),
        "constants": dict(constants),
        "options": options,
    }
    asked = _compiler()
    assert asked.stdin is not None
    assert asked.stdout is not None
    asked.stdin.write(json.dumps(request) + "\n")
    asked.stdin.flush()
    ready, _, _ = select.select([asked.stdout], [], [], _MOST_SECONDS)
    line = asked.stdout.readline() if ready else ""
    if not line:  # a late answer must not pass for the next request's
        asked.kill()
        _compiler.cache_clear()
    assert line, f"{kernel}: the compiler ended, or gave no answer within {_MOST_SECONDS} seconds"
    answer = json.loads(line)
    assert "error" not in answer, answer["error"]
    return {int(architecture): Resources(**each) for architecture, each in answer.items()}


@cache
def _compiler() -> subprocess.Popen[str]:
    """The process that compiles, until this one ends."""
    folder = tempfile.TemporaryDirectory(prefix="triton-cache")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started = subprocess.Popen(
        [sys.executable, __file__],
        env={
            **environment,
            "PYTHONPATH": str(ROOT),
            "TRITON_CACHE_DIR": folder.name,
            "TRITON_DEFAULT_FP_FUSION": "1",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def end() -> None:
        assert started.stdin is not None
        assert started.stdout is not None
        started.stdin.close()
        started.wait(60)
        started.stdout.close()
        folder.cleanup()

    atexit.register(end)
    return started


def _compile(request: Mapping[str, Any], architecture: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = request["kernel"].partition(":")
    kernel = getattr(import_module(module), name)
    signature = {
        argument: "constexpr"
        if argument in request["constants"]
        else request["signature"][argument]
        for argument in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=request["constants"], attrs=aligned
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=request["options"])
    ptx = compiled.asm["ptx"]
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # sm_90 and later get PTX that only the newer assembler of the two takes
    assembler = folder / ("ptxas-blackwell" if architecture >= 90 else "ptxas")
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "kernel.ptx").write_text(ptx)
        command = [str(assembler), "-v", f"--gpu-name={_target(ptx)}", "kernel.ptx", "-o", "out"]
        said = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True).stderr
        dump = [str(folder / "cuobjdump"), "-sass", "out"]
        sass = subprocess.run(dump, cwd=place, capture_output=True, text=True, check=True).stdout
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    assert spills, said
    return Resources(
        registers=int(registers[1]),
        spill_bytes=sum(map(int, spills)),
        shared_bytes=compiled.metadata.shared,
        num_instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", sass, re.MULTILINE)),
    )


def _target(ptx: str) -> str:
    found = re.search(r"\.target (\w+)", ptx)
    assert found is not None
    return found[1]


def main() -> None:
    """Answer every request, a line of standard input, with a line: resources, or the error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what others print is no answer
    for line in sys.stdin:
        try:
            request = json.loads(line)
            found = {each: asdict(_compile(request, each)) for each in ARCHITECTURES}
        except Exception:  # noqa: BLE001 - the error is the answer
            found = {"error": traceback.format_exc()}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
