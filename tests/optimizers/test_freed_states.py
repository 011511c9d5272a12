"""bf16 weights whose state is freed and made anew: no interval rounds with the bits of another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memrt.optimizers.adamw import AdamW
from memrt.optimizers.scaled_gradient import ScaledGradient
from memrt.optimizers.state_formats import STATE_FORMATS

NUM_STEPS = 200
LR = 1e-3
UNIT = 2**-7  # bf16's spacing from 1 to 2


def new_weight() -> nn.Parameter:
    return nn.Parameter(torch.full((64, 64), 1.5, dtype=torch.bfloat16))


def train(optimizer: AdamW, weight: nn.Parameter, steps: range, *, every: int) -> None:
    """Every step is LR upwards in exact arithmetic; the state is freed every so many steps."""
    for step in steps:
        if every and step % every == 0:
            optimizer.state.clear()
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()


def check_walk(weight: Tensor) -> None:
    """Sums of NUM_STEPS independent draws of UNIT or nothing, LR in the mean."""
    moved = weight.detach().double() - 1.5
    chance = LR / UNIT
    spread = UNIT * (NUM_STEPS * chance * (1 - chance)) ** 0.5
    count = moved.numel()
    assert abs(float(moved.mean()) - NUM_STEPS * LR) < 5 * spread / count**0.5
    assert abs(float(moved.std()) / spread - 1) < 5 / (2 * count) ** 0.5
    assert moved.all()  # the chance of never moving is 1e-12


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("state_format", list(STATE_FORMATS))
def test_every_element_goes_its_own_way(state_format: str, every: int) -> None:
    weight = new_weight()
    options: dict[str, Any] = {"betas": (0.0, 0.0), "weight_decay": 0.0}
    optimizer = AdamW([weight], lr=LR, state_format=state_format, **options)
    train(optimizer, weight, range(NUM_STEPS), every=every)
    check_walk(weight)


def test_so_does_a_projected_weight() -> None:
    """Two runs of one step each from equal weights, the second with a state made anew."""
    weight = new_weight()
    projection = ScaledGradient((64, 64), rank=8, every=5)
    optimizer = AdamW([weight], lr=LR, projections={weight: projection})
    moves = []
    for _ in range(2):
        optimizer.state.clear()
        with torch.no_grad():
            weight.fill_(1.5)
        projection.begin_step(0)
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
        moves.append(weight.detach() != 1.5)
    assert moves[0].any()
    assert not torch.equal(*moves)


@pytest.mark.parametrize("state_format", ["float32", "int8"])
def test_resume_is_exact_in_the_middle_of_an_interval(state_format: str) -> None:
    whole = new_weight()
    optimizer = AdamW([whole], lr=LR, state_format=state_format)
    train(optimizer, whole, range(5), every=3)
    second = nn.Parameter(whole.detach().clone())
    resumed = AdamW([second], state_format=state_format)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, weight in ((optimizer, whole), (resumed, second)):
        train(one, weight, range(5, 12), every=3)
    assert torch.equal(whole, second)


def test_a_checkpoint_that_does_not_know_goes_on_as_it_would_have() -> None:
    whole = new_weight()
    optimizer = AdamW([whole], lr=LR)
    train(optimizer, whole, range(3), every=0)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state_lifetimes"]
    second = nn.Parameter(whole.detach().clone())
    resumed = AdamW([second])
    resumed.load_state_dict(saved)
    for one, weight in ((optimizer, whole), (resumed, second)):
        train(one, weight, range(3, 6), every=0)
        one.state.clear()
        train(one, weight, range(6, 9), every=0)
    assert torch.equal(whole, second)


def test_counts_of_other_parameters_are_refused() -> None:
    optimizer = AdamW([new_weight()])
    with pytest.raises(ValueError, match="counts of 2 parameters"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state_lifetimes": [1, 1]})
