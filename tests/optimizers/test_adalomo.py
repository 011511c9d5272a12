"""AdaLomo against its equations in fp64, against the authors' package, and in its bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memrt.kernels import adalomo
from memrt.optimizers.adalomo import AdaLomo

SHAPES: list[tuple[int, ...]] = [(16, 24), (9,), (5, 3, 4), (1, 7), (6, 1)]
SETTINGS = {"lr": 5e-2, "weight_decay": 0.1}


def gradients(step: int, *, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def starts() -> list[Tensor]:
    return gradients(999)


class Equations:
    """The docstring's formula on one parameter, in fp64."""

    def __init__(self, weight: Tensor, *, lr: float, weight_decay: float) -> None:
        self.weight = weight.double().flatten(1) if weight.ndim > 1 else weight.double()
        self.lr, self.weight_decay, self.t = lr, weight_decay, 0
        self.row = self.column = self.whole = torch.zeros((), dtype=torch.float64)

    def step(self, gradient: Tensor) -> Tensor:
        """One update; returns U."""
        gradient = gradient.double().view(self.weight.shape)
        self.t += 1
        fresh = self.t**-0.8
        squared = gradient**2 + 1e-30
        if gradient.ndim == 1:
            self.whole = (1 - fresh) * self.whole + fresh * squared
            update = gradient / self.whole.sqrt()
        else:
            self.row = (1 - fresh) * self.row + fresh * squared.mean(1)
            self.column = (1 - fresh) * self.column + fresh * squared.mean(0)
            update = gradient / (torch.outer(self.row, self.column) / self.row.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        size = self.lr * max(1e-3, float(self.weight.square().mean().sqrt()))
        self.weight = self.weight * (1 - size * self.weight_decay) - size * update
        return update


@pytest.mark.parametrize("piece", [2**22, 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_its_equations(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in pieces; errors of one rounding a step. Gradients grow and shrink."""
    monkeypatch.setattr(adalomo, "PIECE_ELEMENTS", piece)
    parameters = [nn.Parameter(start.to(dtype)) for start in starts()]
    references = [Equations(p.detach(), **SETTINGS) for p in parameters]
    optimizer = AdaLomo(parameters, **SETTINGS)
    eps = torch.finfo(dtype).eps
    for step in range(6):
        given = gradients(step, scale=10.0 ** (step - 3))
        for parameter, reference, gradient in zip(parameters, references, given, strict=True):
            parameter.grad = gradient.to(dtype)
            update = reference.step(parameter.grad)
            assert float(update.square().mean().sqrt()) <= 1 + 1e-12
        optimizer.step()
        for parameter, reference in zip(parameters, references, strict=True):
            error = (parameter.detach().double().flatten() - reference.weight.flatten()).abs()
            assert float(error.max()) <= (step + 1) * 4 * eps * float(reference.weight.abs().max())


def test_the_first_step_takes_the_gradient_alone() -> None:
    """w_1 = 1: no trace of the zeros that the state began with, and no bias to correct."""
    weight = nn.Parameter(torch.full((4,), 2.0))
    optimizer = AdaLomo([weight], lr=0.5)
    weight.grad = torch.tensor([1e-3, -1e3, 1.0, -1.0])
    optimizer.step()
    assert torch.allclose(weight, 2.0 - 0.5 * 2.0 * weight.grad.sign(), rtol=1e-6)
    assert torch.equal(optimizer.state[weight]["exp_avg_sq"], weight.grad.square())


def test_zeros_stay_finite() -> None:
    """Rows and whole gradients of zeros, and weights of zeros, which step by eps_2 at least."""
    weight = nn.Parameter(torch.zeros(4, 3))
    optimizer = AdaLomo([weight], lr=1.0)
    for rows in (0, 2, 0):
        weight.grad = torch.zeros(4, 3)
        weight.grad[:rows] = 1.0
        optimizer.step()
        assert torch.isfinite(weight).all()
    assert weight[:2].abs().max() > 0
    assert torch.equal(weight[2:], torch.zeros(2, 3))


def test_state_is_rows_and_columns() -> None:
    parameters = [nn.Parameter(start) for start in starts()]
    optimizer = AdaLomo(parameters)
    for parameter, gradient in zip(parameters, gradients(0), strict=True):
        parameter.grad = gradient
    optimizer.step()
    held = [
        sum(v.numel() * v.element_size() for v in optimizer.state[p].values()) for p in parameters
    ]
    assert held == [4 * (n + 1) for n in (16 + 24, 9, 5 + 12, 1 + 7, 6 + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stack_of_experts_is_stepped_as_experts_apart(dtype: torch.dtype) -> None:
    """To the bit; 4 E (m + n) bytes. The expert without a token decays, and no more."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(3, 16, 24, generator=generator).to(dtype)
    stack = nn.Parameter(start.transpose(1, 2).contiguous().transpose(1, 2))
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]  # strided, too
    settings = {**SETTINGS, "stochastic_rounding": False}
    ours, theirs = AdaLomo([stack], **settings), AdaLomo(apart, **settings)
    for step in range(4):
        stack.grad = torch.randn(3, 16, 24, generator=generator).to(dtype) * 10.0 ** (step - 2)
        stack.grad[step % 3] = 0.0
        for matrix, gradient in zip(apart, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    assert torch.equal(stack, torch.stack([matrix.detach() for matrix in apart]))
    state = ours.state[stack]
    assert sum(v.numel() * v.element_size() for v in state.values()) == 4 * 3 * (16 + 24) + 4
    for name in ("exp_avg_sq_row", "exp_avg_sq_col"):
        assert torch.equal(state[name], torch.stack([theirs.state[m][name] for m in apart]))
    loaded = AdaLomo([stack], **settings)
    loaded.load_state_dict(ours.state_dict())
    assert loaded.state[stack].keys() == state.keys()


def test_experts_are_rounded_with_bits_of_their_own() -> None:
    stack = nn.Parameter(torch.ones(8, 16, 24, dtype=torch.bfloat16))
    optimizer = AdaLomo([stack], lr=1e-3)  # a quarter of bf16's spacing below 1
    stack.grad = torch.ones_like(stack)
    optimizer.step()
    moved = (stack != 1.0).flatten(1)
    assert not any(torch.equal(moved[0], other) for other in moved[1:])
    # 384 draws of a quarter each, within five standard deviations
    assert ((moved.float().mean(dim=1) - 0.25).abs() < 5 * (0.25 * 0.75 / 384) ** 0.5).all()


def test_the_authors_package_makes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """lomo-optim 0.1.1, whose state is put on CUDA whatever the model, and forgotten by saves.

    It wants a model, its own backward and matrices; its loss scale of 1024 is exact.
    """
    package = pytest.importorskip("lomo_optim", reason="pip install lomo-optim --no-deps")
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    ours = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    ours.load_state_dict(theirs.state_dict())
    peer = package.AdaLomo(theirs, lr=1e-2, weight_decay=0.1)
    optimizer = AdaLomo(ours.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(8):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        peer.fused_backward((theirs(x) - 1).square().mean(), 1e-2)
        optimizer.zero_grad()
        (ours(x) - 1).square().mean().backward()
        optimizer.step()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        error = (mine - yours).detach().abs().max()
        # a rounding of weight, factors and root mean squares in each of the 8 steps
        assert error <= 8 * 4 * torch.finfo(torch.float32).eps * yours.detach().abs().max()
