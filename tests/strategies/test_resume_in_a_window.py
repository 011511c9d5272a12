"""A state that is taken between two micro-batches: who loads it trains the whole window anew."""

from __future__ import annotations

import io

import pytest
import torch

import memrt
from memrt.runner import model_loss
from memrt.session import Session
from tests.strategies.runs import assert_equal, batch_of, model_of

METHODS = [
    "adalomo",
    "apollo(rank=4, every=3)",
    "badam(every=2, parked='host')",
    "fira(rank=4, every=3)",
    "galore(rank=4, every=3)",
    "galore(rank=4, every=3, form='plain')",
    "galore(rank=4, every=3, moments='rotated')",
    "galore(rank=4, every=3, moments='rotated', form='plain')",
    "in_backward",
    "int8_states",
    "lisa(layers=1, every=2)",
    "q_galore(rank=4, every=2)",
]
STEPS = 5


def prepared(spec: str, *, seed: int = 0) -> Session:
    return memrt.prepare(model_of("plain", seed=seed), [spec], lr=1e-2, weight_decay=0.1)


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
@pytest.mark.parametrize("spec", METHODS)
def test_the_window_is_trained_anew_to_the_bit(spec: str, stop: int) -> None:
    whole, stopped = prepared(spec), prepared(spec)
    train(whole, first=0, last=STEPS)
    train(stopped, first=0, last=stop)
    micro_batch(stopped, stop, 0)
    buffer = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "run": stopped.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    resumed = prepared(spec, seed=9)
    resumed.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["run"])
    train(resumed, first=stop, last=STEPS)
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())
