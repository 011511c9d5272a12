"""Measured runs: what one leaves behind for the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from memrt import registry
from memrt.cli.profile import _kernel_scratch
from memrt.measure import MIN_STEPS, Workload, measure, measured_peaks
from memrt.runner import train_step
from memrt.strategy import Strategy
from memrt.structure import RunSettings
from memrt.testing import tiny_batches, tiny_model


@dataclass
class Builder:
    """Builds models, and counts at every one how many earlier ones are still there."""

    alive: list[int] = field(default_factory=list)
    built: list[weakref.ref[nn.Module]] = field(default_factory=list)

    def __call__(self, strategies: Sequence[Strategy]) -> nn.Module:
        self.alive.append(sum(model() is not None for model in self.built))
        model = tiny_model("llama", layers=1)
        self.built.append(weakref.ref(model))
        return model


def _workload(build: Callable[[Sequence[Strategy]], nn.Module], **settings: Any) -> Workload:
    return Workload(
        build=build,
        windows=[tiny_batches("llama", count=1, seed=seed) for seed in range(MIN_STEPS)],
        settings=RunSettings(max_grad_norm=1.0),
        device=torch.device("cpu"),
        **settings,
    )


def test_no_run_is_measured_beside_the_model_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    workload = _workload(build)
    for stack in ([], ["int8_states", "offload_activations"], []):
        measure(workload, registry.parse_all(stack))
    for stack in (["activation_checkpoint"], []):
        measured_peaks(workload, registry.parse_all(stack))
    _kernel_scratch(workload, registry.parse_all(["int8_states"]))

    def exhausted(run: Any, window: Any) -> None:
        if run.session.step_index:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        train_step(run, window)

    monkeypatch.setattr("memrt.measure.train_step", exhausted)
    for _ in range(2):
        with pytest.raises(MemoryError, match="20 GiB"):
            measure(workload, registry.parse_all(["activation_checkpoint"]))
    assert build.alive == [0] * 8
