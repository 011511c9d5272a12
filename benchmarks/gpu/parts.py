"""The parts of the GPU suite: their processes, and each one's share of the time.

`share_seconds` is what a stage (a part, or several beside each other) is thought to need of nine
minutes on a large card; nobody has measured it. The shares of everything that runs by default fit
into nine minutes, and where fewer parts run, each has more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = ["DEFAULT_PARTS", "MODEL_SIZES", "PARTS", "Part", "plans_part", "stages"]

MODEL_SIZES = ("0.1B", "0.5B", "1B", "3B", "8B")
FAMILIES = ("llama", "gpt2", "bert", "plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A process: its module, the file that it fills, and what it may take."""

    name: str
    module: str
    share_seconds: float
    only: tuple[str, ...] = ()
    label: str = ""
    """Of its own file, where others of the same name run beside it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_device: bool = True
    takes_times: bool = False
    """Whether it measures time, so that nothing else should run."""

    @property
    def title(self) -> str:
        """Tells it from the others."""
        return " ".join((self.name, *(each.strip() for each in self.only)))

    def file(self, folder: Path) -> Path:
        """What the process fills."""
        return folder / f"{self.name}{'-' if self.label else ''}{self.label}.json"

    def command(self, arguments: argparse.Namespace) -> list[str]:
        """The command line."""
        only = ["--only", *self.only] if self.only else []
        label = ["--label", self.label] if self.label else []
        device = arguments.device if self.needs_device else "cpu"
        return [
            *(sys.executable, "-m", f"benchmarks.gpu.{self.module}"),
            *("--device", device, "--scale", arguments.scale),
            *("--output", str(arguments.output), *only, *label),
        ]


_FEW_THREADS = {"OMP_NUM_THREADS": "2"}
"""Of what runs beside others: small models and small matrices on the CPU."""


def _correctness() -> list[Part]:
    """A process for each family, and for the stacks of each."""
    cases = [*(f"{name} " for name in FAMILIES), *(f"stack {name} " for name in FAMILIES)]
    return [
        Part(
            name="correctness",
            module="correctness",
            share_seconds=140,
            only=(each,),
            label=each.strip().replace(" ", "-"),
            environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **_FEW_THREADS},
        )
        for each in cases
    ]


def _timed(name: str, share_seconds: float, *only: str, module: str = "") -> Part:
    return Part(
        name=name,
        module=module or name,
        share_seconds=share_seconds,
        only=only,
        takes_times=True,
    )


_MEMORY_SHARES = dict(zip(MODEL_SIZES, (15, 60, 30, 25, 45), strict=True))

PARTS: dict[str, list[Part]] = {
    "constants": [Part(name="constants", module="constants", share_seconds=20)],
    "correctness": _correctness(),
    "operators": [
        Part(name="operators", module="operators", share_seconds=140, environment=_FEW_THREADS)
    ],
    "tests": [Part(name="tests", module="device_tests", share_seconds=45)],
    "kernels": [_timed("kernels", 25)],
    "updates": [_timed("updates", 55)],
    "speed": [_timed("speed", 75)],
    "memory": [_timed("memory", share, f"{size} ") for size, share in _MEMORY_SHARES.items()],
    "seventy_b": [
        _timed("seventy_b", 60, "gradients"),
        _timed("seventy_b", 150, "ladder"),
        _timed("seventy_b", 150, "adapters"),
        _timed("seventy_b", 150, "QLoRA"),
    ],
}
"""In the order in which they run."""

BESIDE = ("correctness", "operators")
"""Parts whose processes run beside each other, in one stage."""

DEFAULT_PARTS = tuple(name for name in PARTS if name != "seventy_b")

_PLANNED = {"memory": tuple(f"{size} " for size in MODEL_SIZES), "seventy_b": ("70B ",)}


def plans_part(names: Sequence[str], scale: str) -> Part | None:
    """The plans of what the named parts train; without a device, so beside them."""
    sizes = tuple(size for name in names for size in _PLANNED.get(name, ()))
    if not sizes:
        return None
    return Part(
        name="plans",
        module="plans",
        share_seconds=0,
        only=sizes if scale == "full" else (),
        environment={"CUDA_VISIBLE_DEVICES": "", **_FEW_THREADS},
        needs_device=False,
    )


def stages(names: Sequence[str], scale: str) -> list[list[Part]]:
    """What runs beside each other, in order."""
    found: list[list[Part]] = []
    beside: list[Part] = []
    for name in (each for each in PARTS if each in names):
        parts = PARTS[name] if scale == "full" else [_whole(PARTS[name][0])]
        if name not in BESIDE:
            found += [[part] for part in parts]
            continue
        if not beside:
            found.append(beside)
        beside += parts
    return found


def _whole(part: Part) -> Part:
    """One process for all cases, of which the tiny scale has few."""
    return replace(part, only=(), label="")
