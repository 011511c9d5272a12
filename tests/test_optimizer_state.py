"""Where the state of a parameter lies while it waits, and where it lies when it is back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from memrt.observer import Observer
from memrt.optimizer_state import OptimizerState
from memrt.optimizers.adamw import AdamW
from memrt.optimizers.state_formats import STATE_FORMATS
from memrt.places import Mover
from memrt.profiling.accounts import Place

DEVICE = "meta"  # stands in for a device that is not the host


def _devices(state: Any) -> dict[str, str]:
    return {key: tensor.device.type for key, tensor in state.items()}


def _setup(state_format: str) -> tuple[OptimizerState, nn.Parameter]:
    model = nn.Linear(64, 128, device=DEVICE)
    optimizer = AdamW(model.parameters(), state_format=state_format)
    observer = Observer(None)
    held = OptimizerState(Mover(model, observer), observer)
    held.optimizer = optimizer
    form = STATE_FORMATS[state_format]()
    optimizer.state[model.weight] = form.create(model.weight.shape, model.weight.device)
    return held, model.weight


@pytest.mark.parametrize("state_format", list(STATE_FORMATS))
def test_what_lies_on_the_host_stays_there_through_parking(state_format: str) -> None:
    """A step counter that is read must not end on the device: every later step would wait."""
    held, weight = _setup(state_format)
    assert held.optimizer is not None
    before = _devices(held.optimizer.state[weight])
    assert (before["step"] == "cpu") == (state_format != "float32")
    held.release("weight", weight, Place.HOST)
    assert weight not in held.optimizer.state
    held.restore("weight", weight)
    assert _devices(held.optimizer.state[weight]) == before


@pytest.mark.parametrize("written_on", ["device", "cpu"])
@pytest.mark.parametrize("state_format", ["float32", "int8"])
def test_so_it_does_in_a_run_that_is_resumed(state_format: str, written_on: str) -> None:
    """Also from a state that the CPU wrote, where all of it lies on the host."""
    held, weight = _setup(state_format)
    assert held.optimizer is not None
    before = _devices(held.optimizer.state[weight])
    held.release("weight", weight, Place.HOST)
    saved = held.parked_state()
    for entry in saved.values():  # as a checkpoint is loaded: on the host, all of it
        entry["state"] = {k: torch.zeros(t.shape, dtype=t.dtype) for k, t in entry["state"].items()}
        if written_on == "cpu":
            entry["on_host"] = []
    resumed, weight = _setup(state_format)
    assert resumed.optimizer is not None
    resumed.optimizer.state.clear()
    resumed.load_parked_state(saved, {"weight": weight})
    resumed.restore("weight", weight)
    assert _devices(resumed.optimizer.state[weight]) == before
