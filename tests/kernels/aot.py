"""Compiles Triton kernels ahead of time for GPUs that this machine does not have.

`compile_ahead` runs this file in a process of its own, where Triton is not interpreting, and gives
for every architecture what ptxas says of the kernel: registers a thread, bytes spilled to memory,
shared memory, and the machine's instructions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 89, 90, 100)
SHARED_LIMIT_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""The most that a block may have (CUDA C++ Programming Guide, technical specifications)."""


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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(request),
            env={
                **environment,
                "PYTHONPATH": str(ROOT),
                "TRITON_CACHE_DIR": cache,
                "TRITON_DEFAULT_FP_FUSION": "1",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {int(architecture): Resources(**each) for architecture, each in found.items()}


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
    """Read a request from standard input, write the resources as the last line of the output."""
    request = json.load(sys.stdin)
    found = {
        architecture: asdict(_compile(request, architecture)) for architecture in ARCHITECTURES
    }
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
