"""Fira's projection against its equations in fp64, against GaLore, and its state."""

from __future__ import annotations

import io
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memrt.kernels import mixed_precision, projected_update
from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.optimizers.formed_subspace import FormedSubspace
from memrt.optimizers.residual_subspace import ResidualSubspace
from tests.kernels.live_bytes import LiveBytes
from tests.optimizers.test_formed_subspace import (
    SETTINGS,
    gradient_of,
    optimizer_of,
    parameter,
    train,
)

SHAPES = [(24, 40), (40, 24), (32, 32), (9, 101), (101, 9)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape: tuple[int, int], **options: Any) -> ResidualSubspace:
    return ResidualSubspace(shape, **({"rank": 5, "every": 3, "scale": 0.25} | options))


class Written:
    """The paper's equations for one weight in fp64, with E formed; P is given to every step."""

    def __init__(self, weight: Tensor, *, growth: float, residual_scale: float) -> None:
        self.weight = weight.detach().double().clone()
        self.left = weight.shape[0] < weight.shape[1]
        self.growth, self.residual_scale = growth, residual_scale
        self.m = self.v = torch.zeros((), dtype=torch.float64)
        self.t, self.last, self.num_limited = 0, 0.0, 0

    def step(self, gradient: Tensor, basis: Tensor) -> None:
        p, g = basis.double(), gradient.double()
        g = g if self.left else g.t()  # [s, l]: channels are columns
        r = p.t() @ g
        self.t += 1
        beta1, beta2 = SETTINGS["betas"]
        self.m = beta1 * self.m + (1 - beta1) * r
        self.v = beta2 * self.v + (1 - beta2) * r * r
        correct1, correct2 = 1 - beta1**self.t, 1 - beta2**self.t
        n = (self.m / correct1) / ((self.v / correct2).sqrt() + SETTINGS["eps"])
        correction = sqrt(correct2) / correct1
        rest = (g - p @ r) * (n / correction).norm(dim=0) / (r.norm(dim=0) + 1e-8)
        norm = float(rest.norm())
        if self.last > 0 and norm > self.growth * self.last:
            rest *= self.growth * self.last / norm
            self.num_limited += 1
        self.last = float(rest.norm())
        update = 0.25 * (p @ n) + self.residual_scale * correction * rest
        lr = SETTINGS["lr"]
        self.weight *= 1 - lr * SETTINGS["weight_decay"]
        self.weight -= lr * (update if self.left else update.t())


@each_shape
@pytest.mark.parametrize(("growth", "residual_scale"), [(1.01, 1.0), (1e9, 0.5)])
def test_it_is_the_papers_equations(
    shape: tuple[int, int], growth: float, residual_scale: float
) -> None:
    """Through three bases, with a gradient that changes its size from step to step."""
    weight = parameter(shape)
    projection = make(shape, growth=growth, residual_scale=residual_scale)
    optimizer = optimizer_of(weight, projection)
    written = Written(weight, growth=growth, residual_scale=residual_scale)
    for step in range(9):
        gradient = gradient_of(shape, step) * 3.0 ** (step % 4)
        projection.begin_step(step)
        weight.grad = gradient.clone()
        optimizer.step()
        written.step(gradient, projection.tensors()["basis"])
        # sums of at most 101 numbers, in updates of at most 64 times the learning rate
        atol = (step + 1) * 2**-24 * (4 + 1e-2 * 64 * 101)
        torch.testing.assert_close(weight.detach().double(), written.weight, rtol=0, atol=atol)
        assert torch.equal(weight.grad, gradient)
    assert projection.refresh_count == 3
    assert written.num_limited >= 3 if growth < 2 else written.num_limited == 0


@each_shape
def test_a_gradient_inside_the_subspace_leaves_nothing_but_galores_step(
    shape: tuple[int, int],
) -> None:
    ours, plain = parameter(shape), parameter(shape)
    other = FormedSubspace(shape, rank=5, every=3, scale=0.25)
    projections = (make(shape), other)
    optimizers = [optimizer_of(ours, projections[0]), optimizer_of(plain, other)]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, 5, generator=generator) for size in shape)
    for step in range(5):
        for weight, projection, optimizer in zip(
            (ours, plain), projections, optimizers, strict=True
        ):
            projection.begin_step(step)
            weight.grad = left @ right.t() * (1 + step)
            optimizer.step()
    # what is outside is rounding: 2^-24 of a channel of G, scaled by at most sqrt(5) / ‖R_j‖
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=5 * 1e-2 * 64 * 2**-24 * 5)


def test_the_update_has_full_rank() -> None:
    weight, projection = parameter((24, 40)), make((24, 40))
    before = weight.detach().clone()
    train(weight, projection, optimizer_of(weight, projection, weight_decay=0.0), range(1))
    moved = weight.detach() - before
    assert int(torch.linalg.matrix_rank(moved, rtol=1e-4)) == 24


@pytest.mark.parametrize("saved_at", [2, 3, 4])
@pytest.mark.parametrize("state_format", ["float32", "int8"])
def test_resume_changes_no_bit(state_format: str, saved_at: int) -> None:
    shape, runs = (72, 1100), []
    for stop in (0, saved_at):
        weight, projection = parameter(shape), make(shape)
        optimizer = optimizer_of(weight, projection, state_format=state_format)
        train(weight, projection, optimizer, range(stop or 7))
        if stop:
            file = io.BytesIO()
            state = {"w": weight.data, "p": projection.state_dict(), "o": optimizer.state_dict()}
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            weight, projection = nn.Parameter(state["w"]), make(shape)
            optimizer = optimizer_of(weight, projection, state_format=state_format)
            projection.load_state_dict(state["p"])
            optimizer.load_state_dict(state["o"])
            train(weight, projection, optimizer, range(stop, 7))
        runs.append(weight)
    assert torch.equal(runs[0], runs[1])


def test_what_is_held_is_a_basis_and_a_norm_and_both_are_forgotten() -> None:
    weight, projection = parameter((24, 40)), make((24, 40))
    train(weight, projection, optimizer_of(weight, projection), range(2))
    assert {n: t.numel() for n, t in projection.tensors().items()} == {"basis": 24 * 5, "norm": 1}
    projection.forget()
    assert projection.tensors() == {}
    with pytest.raises(ValueError, match=r"residual_scale is 0\.0"):
        make((24, 40), residual_scale=0.0)
    with pytest.raises(ValueError, match="columns that are orthonormal"):
        make((24, 40), basis="bfloat16")


@each_shape
@pytest.mark.parametrize("kind", [FormedSubspace, ResidualSubspace])
def test_a_bf16_weight_gets_the_bits_of_an_fp32_copy_that_is_rounded_at_the_end(
    shape: tuple[int, int], kind: type[FormedSubspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projected_update, "PIECE_ELEMENTS", 100)
    way = Rounding((1234, 5678), torch.tensor(3.0))
    expected, narrow = (parameter(shape, torch.bfloat16).detach() for _ in range(2))
    nearest, wide = narrow.clone(), narrow.float()
    for weight, rounding in ((wide, None), (narrow, way), (nearest, None)):
        projection = kind(shape, rank=5, every=3)
        projection.begin_step(0)
        projection.receive(gradient_of(shape, 0, torch.bfloat16))
        gradient = projection.gradient()
        assert gradient is not None
        direction = torch.tanh(gradient)
        projection.apply(weight, direction, lr=0.01, decay=0.9, rounding=rounding)
    stochastic_copy_(expected, wide, rounding=way)
    assert torch.equal(narrow, expected)
    assert torch.equal(nearest, wide.bfloat16())
    assert not torch.equal(narrow, nearest)


@pytest.mark.parametrize("shape", [(16, 4096), (4096, 16)])
@pytest.mark.parametrize("kind", [FormedSubspace, ResidualSubspace])
def test_a_bf16_weight_is_not_copied(
    shape: tuple[int, int], kind: type[FormedSubspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is alive in a step are some numbers a channel, and a piece of the gradient for R."""
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", 4096)
    weight, projection = parameter(shape, torch.bfloat16), kind(shape, rank=1, every=9)
    optimizer = optimizer_of(weight, projection)
    train(weight, projection, optimizer, range(2))
    projection.begin_step(2)
    weight.grad = gradient_of(shape, 2, torch.bfloat16)
    with LiveBytes([weight, weight.grad]) as live:
        optimizer.step()
    assert 0 < live.peak_bytes <= 4 * 4096 * 10 < 4 * weight.numel()
