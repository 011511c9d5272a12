"""A state that is taken between two micro-batches: who loads it trains the whole window anew."""

from __future__ import annotations

import io

import pytest
import torch

import memrt
from memrt.runner import model_loss
from memrt.session import Session
from tests.strategies.runs import assert_equal, batch_of, model_of, states

METHODS = [
    "adalomo(clip='two_pass')",
    "apollo(rank=4, every=3)",
    "apollo_mini(every=3)",
    "badam(every=2, parked='host')",
    "fira(rank=4, every=3)",
    "galore(rank=4, every=3)",
    "galore(rank=4, every=3, form='plain')",
    "galore(rank=4, every=3, moments='rotated')",
    "galore(rank=4, every=3, moments='rotated', form='plain')",
    "in_backward",
    "lisa(layers=1, every=2)",
    "lomo(clip='two_pass')",
]
QUANTIZED = ["fp8_states", "int4_states", "int8_states", "q_galore(rank=32, every=2)"]
"""Tried on layers that are wide enough for a state of 4096 elements: less is not quantized."""
STEPS = 5


def prepared(spec: str, *, seed: int = 0) -> Session:
    model = model_of("plain", seed=seed, hidden=64 if spec in QUANTIZED else 32)
    return memrt.prepare(model, [spec], lr=1e-2, weight_decay=0.1)


def micro_batch(run: Session, step: int, index: int) -> None:
    torch.manual_seed(500 + 10 * step + index)
    with run.micro_batch(last=index == 1):
        run.backward(model_loss(run.model, batch_of("plain", seed=10 * step + index)) / 2)


def train(run: Session, *, first: int, last: int) -> None:
    for step in range(first, last):
        micro_batch(run, step, 0)
        micro_batch(run, step, 1)
        run.step()


@pytest.mark.parametrize("stop", [0, 3])
@pytest.mark.parametrize("spec", [*METHODS, *QUANTIZED])
def test_the_window_is_trained_anew_to_the_bit(spec: str, stop: int) -> None:
    whole, stopped = prepared(spec), prepared(spec)
    train(whole, first=0, last=STEPS)
    if spec in QUANTIZED:
        assert whole.optimizer is not None
        state = states(whole.optimizer, whole.model)["layers.0.1.weight"]
        assert any(tensor.itemsize == 1 for tensor in state.values())
    train(stopped, first=0, last=stop)
    micro_batch(stopped, stop, 0)
    buffer = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "run": stopped.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = prepared(spec, seed=9)
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["run"])
    train(resumed, first=stop, last=STEPS)
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())
