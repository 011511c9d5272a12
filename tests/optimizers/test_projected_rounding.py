"""bf16 weights under every projection: a step too small for bf16 arrives in the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memrt.optimizers.adamw import AdamW
from memrt.optimizers.formed_subspace import FormedSubspace
from memrt.optimizers.residual_subspace import ResidualSubspace
from memrt.optimizers.scaled_gradient import ScaledGradient
from memrt.optimizers.subspace import Subspace
from tests.kernels.live_bytes import LiveBytes

SHAPE = (64, 96)
PROJECTIONS: dict[str, Callable[[], Any]] = {
    "galore": lambda: Subspace(SHAPE, rank=8, every=5),
    "galore in int4": lambda: Subspace(SHAPE, rank=8, every=5, basis="int4"),
    "plain galore": lambda: FormedSubspace(SHAPE, rank=8, every=5, solver="svd"),
    "fira": lambda: ResidualSubspace(SHAPE, rank=8, every=5),
    "apollo": lambda: ScaledGradient(SHAPE, rank=8, every=5),
}


def stepped(name: str, *, dtype: torch.dtype, stochastic: bool) -> Tensor:
    """A weight of ones after one step of 1e-4, which is a fortieth of bf16's spacing there."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(160, size, generator=generator) for size in SHAPE)
    weight = nn.Parameter(torch.ones(SHAPE, dtype=dtype))
    projection = PROJECTIONS[name]()
    optimizer = AdamW(
        [weight],
        lr=1e-4,
        weight_decay=0.0,
        stochastic_rounding=stochastic,
        projections={weight: projection},
    )
    projection.begin_step(0)
    if isinstance(projection, Subspace):
        projection.accumulate(rows, columns)
    else:
        weight.grad = (rows.t() @ columns).to(dtype)
    optimizer.step()
    return weight.detach().double() - 1


@pytest.mark.parametrize("name", PROJECTIONS)
def test_small_steps_arrive_in_the_mean(name: str) -> None:
    exact = stepped(name, dtype=torch.float32, stochastic=True)
    rounded = stepped(name, dtype=torch.bfloat16, stochastic=True)
    nearest = stepped(name, dtype=torch.bfloat16, stochastic=False)
    assert float(exact.abs().max()) < 2**-9  # bf16 has 1 - 2^-8 and 1 + 2^-7 beside 1
    assert not nearest.any()
    assert 0 < int((rounded != 0).sum()) < rounded.numel() / 2
    # where the step is upwards and where it is downwards: a draw of ones and zeros for each element
    for side in (exact > 0, exact < 0):
        spacing = 2**-7 if bool((exact[side] > 0).any()) else 2**-8
        chance = (exact[side].abs() / spacing).clamp(max=1)
        deviation = spacing * float((chance * (1 - chance)).sum().sqrt())
        # bf16 gradients shift every chance a little: by 2^-8 of itself, and more for R near zero
        slack = 0.05 * float(exact[side].abs().sum())
        assert abs(float((rounded - exact)[side].sum())) < 5 * deviation + slack


@pytest.mark.parametrize("shape", [(16, 4096), (4096, 16)])
def test_a_bf16_weight_is_not_copied(shape: tuple[int, int]) -> None:
    """What is alive in a step are R, AdamW's direction of it, and both moments at the first."""
    weight = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    projection = Subspace(shape, rank=1, every=9)
    optimizer = AdamW([weight], projections={weight: projection})
    projection.begin_step(0)
    projection.accumulate(*(torch.randn(8, size) for size in shape))
    with LiveBytes([weight, *projection.tensors().values()]) as live:
        optimizer.step()
    assert 0 < live.peak_bytes <= 4 * 4096 * 5 < 4 * weight.numel()
