"""What `memrt doctor` tries, each in a process of its own: a broken library cannot take it down.

python -m memrt.diagnosis_probes torch        # one JSON object on stdout
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["PROBES", "main"]

_BITSANDBYTES = re.compile(r"^\s+(import|from) bitsandbytes", re.MULTILINE)


def _torch() -> dict[str, Any]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "total_bytes": properties.total_memory,
            }
        )
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "devices": devices,
        "architectures": torch.cuda.get_arch_list(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _trainer() -> dict[str, Any]:
    import memrt

    return {"trainer": memrt.Trainer.__mro__[1].__name__}


def _train_on(device: str) -> dict[str, Any]:
    """One optimizer step with strategies that change forward, backward and optimizer."""
    import torch
    from torch import nn

    import memrt

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2)
            )

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    torch.manual_seed(0)
    model = Layers().to(device)
    run = memrt.prepare(model, ["galore(rank=4)", "activation_checkpoint"], lr=1e-2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with run.micro_batch(last=True):
        run.backward(model(torch.ones(4, 16, device=device)).square().mean())
    run.step()
    after = list(model.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    finite = all(bool(torch.isfinite(each).all()) for each in after)
    return {"trained": all(moved) and finite}


def _train_on_cpu() -> dict[str, Any]:
    return _train_on("cpu")


def _train_on_cuda() -> dict[str, Any]:
    return _train_on("cuda")


def _bitsandbytes() -> dict[str, Any]:
    """One 8-bit step through memrt's own operator, on every device that there is."""
    import bitsandbytes
    import torch
    from bitsandbytes.cextension import lib

    from memrt import prepare

    found: dict[str, Any] = {
        "version": bitsandbytes.__version__,
        "cuda_library": bool(getattr(lib, "compiled_with_cuda", False)),
    }
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        model = torch.nn.Linear(64, 64, bias=False).to(device)
        run = prepare(model, ["int8_states"])
        with run.micro_batch(last=True):
            run.backward(model(torch.ones(2, 64, device=device)).sum())
        run.step()
        found[device] = True
    return found


def _triton() -> dict[str, Any]:
    import triton

    return {"version": triton.__version__}


def _kernels() -> dict[str, Any]:
    """Operators, those with a Triton kernel, and those that are compiled on the CPU."""
    import memrt.kernels

    folder = Path(next(iter(memrt.kernels.__path__)))
    with_triton = {path.stem for path in (folder / "_triton").glob("*.py")}
    operators = []
    for path in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"memrt.kernels.{path.stem}")
        # `x_reference` beside `x` marks an operator; other modules serve operators
        if any(name.endswith("_reference") for name in vars(module)):
            operators.append(
                {
                    "name": path.stem,
                    "triton": path.stem in with_triton,
                    "bitsandbytes": _BITSANDBYTES.search(path.read_text("utf-8")) is not None,
                    "compiled": any(
                        type(value).__name__ == "CompiledFunction"
                        for value in vars(module).values()
                    ),
                }
            )
    return {"operators": operators}


def _pinned() -> dict[str, Any]:
    import torch

    size = 256 * 2**20
    torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return {"pinned_bytes": size}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _torch,
    "trainer": _trainer,
    "train_cpu": _train_on_cpu,
    "train_cuda": _train_on_cuda,
    "bitsandbytes": _bitsandbytes,
    "triton": _triton,
    "kernels": _kernels,
    "pinned": _pinned,
}


def main(name: str) -> int:
    """Run a probe; what it raises ends the process, and the parent reads the last line."""
    found = PROBES[name]()
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
