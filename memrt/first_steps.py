"""The first optimizer steps of a training run, counted by a ledger and written as a report."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from memrt import __version__
from memrt.checkpoint import write_json
from memrt.profiling.ledger import Ledger

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__all__ = ["FirstSteps"]

NUM_STEPS = 3
"""The first step makes the optimizer's state, the second is the first that holds all, and a third
shows whether bytes still grow."""


class FirstSteps:
    """Enters the ledger while an optimizer step runs, for `NUM_STEPS` steps.

    Between steps (logging, evaluation, saving) nothing is counted.
    """

    def __init__(self, *, device: torch.device) -> None:
        self.ledger = Ledger(device_type=device.type)
        self.num_counted = 0
        self._device = device
        self._open = ExitStack()

    def begin(self) -> None:
        """An optimizer step begins."""
        self._open.enter_context(self.ledger)

    def end(self) -> bool:
        """An optimizer step is over; whether it was the last one to count."""
        self._open.close()
        self.num_counted += 1
        return self.num_counted == NUM_STEPS

    def abandon(self) -> None:
        """Leave the ledger after an exception, which would otherwise go on counting forever."""
        self._open.close()

    def write(self, path: Path, *, model: nn.Module, **conditions: Any) -> None:
        """Write what was counted as JSON, with the conditions it was counted under."""
        cuda = self._device.type == "cuda"
        packages = ("torch", "transformers", "accelerate")
        where: dict[str, Any] = {
            "versions": {"memrt": __version__} | {name: version(name) for name in packages},
            "device": torch.cuda.get_device_name(self._device) if cuda else str(self._device),
            "model": type(model).__name__,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "num_steps": self.num_counted,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_memory_report(path, self.ledger, {**where, **conditions})


def _write_memory_report(path: Path, ledger: Ledger, conditions: dict[str, Any]) -> None:
    peak = ledger.timeline.peak()
    report = {
        **peak.to_json(),
        "phases": ledger.timeline.phase_peaks(),
        "top_allocations": ledger.timeline.top_allocations(peak.instant),
        "conditions": conditions,
    }
    write_json(path, report)
