"""Measured runs: what one leaves behind for the next."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def test_a_last_step_that_spoils_the_weights_is_told_in_numbers_that_json_takes() -> None:
    num_backward = 0

    def spoil(gradient: Tensor) -> Tensor:
        nonlocal num_backward
        num_backward += 1
        return gradient * float("nan") if num_backward == MIN_STEPS else gradient

    def build(strategies: Sequence[Strategy]) -> nn.Module:
        model = tiny_model("llama", layers=1)
        next(model.parameters()).register_hook(spoil)
        return model

    evaluation = tiny_batches("llama", count=1)
    found = measure(_workload(build, evaluation=evaluation), [])
    json.dumps(found, allow_nan=False)
    assert found["not_finite"] == ["gradient_norms", "evaluation_loss"]
    assert found["evaluation_loss"] is None
    assert [norm is None for norm in found["gradient_norms"]] == [False] * (MIN_STEPS - 1) + [True]
    assert len(found["losses"]) == MIN_STEPS
    num_backward = MIN_STEPS
    sound = measure(_workload(build, evaluation=evaluation), [])
    assert sound["not_finite"] == []
    assert sound["evaluation_loss"] > 0
