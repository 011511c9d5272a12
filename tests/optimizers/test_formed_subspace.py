"""GaLore with a formed gradient: against galore-torch, AdamW, the exact SVD and its own resume."""

from __future__ import annotations

import contextlib
import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.optimizers.adamw import AdamW
from memrt.optimizers.formed_subspace import FormedSubspace, leading_vectors
from tests.kernels.live_bytes import LiveBytes

EPS = 2**-24
SHAPES = [(24, 40), (40, 24), (32, 32), (9, 101), (101, 9)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_solver = pytest.mark.parametrize("solver", ["svd", "gram"])
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def gradient_of(shape: tuple[int, int], step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Leading directions drift slowly, and singular values fall."""
    fixed = torch.Generator().manual_seed(7)
    own = torch.Generator().manual_seed(100 + step)
    values = torch.arange(1, min(shape) + 1).float() ** -0.5
    left, right = (torch.randn(size, min(shape), generator=fixed) for size in shape)
    noise = torch.randn(shape, generator=own)
    return ((left * values) @ right.t() + noise).to(dtype)


def optimizer_of(weight: nn.Parameter, projection: Any, **settings: Any) -> torch.optim.Optimizer:
    return AdamW([weight], projections={weight: projection}, **{**SETTINGS, **settings})


def make(shape: tuple[int, int], **options: Any) -> FormedSubspace:
    return FormedSubspace(shape, **({"rank": 5, "every": 3, "scale": 0.25} | options))


def parameter(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype))


def train(
    weight: nn.Parameter, projection: Any, optimizer: torch.optim.Optimizer, steps: range
) -> None:
    for step in steps:
        projection.begin_step(step)
        weight.grad = gradient_of((weight.shape[0], weight.shape[1]), step, weight.dtype)
        optimizer.step()


@each_shape
def test_it_is_the_authors_galore(shape: tuple[int, int]) -> None:
    """Through three refreshes; with eps so small that its place does not count, and no decay."""
    galore = pytest.importorskip("galore_torch")
    ours, theirs = parameter(shape), parameter(shape)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-20, "weight_decay": 0.0}
    subspace = make(shape, solver="svd")
    optimizer = optimizer_of(ours, subspace, **settings)
    group = {"params": [theirs], "rank": 5, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    other = galore.GaLoreAdamW([group], no_deprecation_warning=True, **settings)
    for step in range(9):
        subspace.begin_step(step)
        ours.grad, theirs.grad = gradient_of(shape, step), gradient_of(shape, step)
        optimizer.step()
        other.step()
        # weights below 4 and steps below lr * scale * 10 * sqrt(r), a few roundings of each a step
        limit = (step + 1) * EPS * (4 + 32 * 1e-2 * 0.25 * 10 * 5**0.5)
        assert float((ours - theirs).detach().abs().max()) <= limit, step
    assert subspace.refresh_count == 3


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_the_identity_as_basis_it_is_adamw(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """R is the gradient to the bit; what is left is the order and number of a step's roundings."""
    ours, plain = parameter(shape, dtype), parameter(shape, dtype)
    subspace = make(shape, scale=1.0)
    subspace.set_basis(torch.eye(min(shape)))
    optimizer, other = optimizer_of(ours, subspace), AdamW([plain], **SETTINGS)
    for step in range(6):
        subspace.begin_step(step)
        ours.grad, plain.grad = gradient_of(shape, step, dtype), gradient_of(shape, step, dtype)
        optimizer.step()
        other.step()
        unit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(ours, plain, rtol=4 * unit, atol=4 * unit * 1e-2 * 3)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[ours][name], other.state[plain][name])
        with torch.no_grad():
            plain.copy_(ours)
    assert subspace.refresh_count == 0


@each_shape
@each_solver
def test_the_vectors_are_those_of_the_exact_svd(shape: tuple[int, int], solver: Any) -> None:
    gradient = gradient_of(shape, 0)
    left = shape[0] < shape[1]
    found, sound = leading_vectors(gradient, 5, solver=solver, left=left)
    assert bool(sound)
    assert (found.t() @ found - torch.eye(5)).abs().max() < 1e-5
    captured = found.t() @ gradient if left else gradient @ found
    best = torch.linalg.svdvals(gradient.double())[:5].square().sum()
    assert float(captured.double().square().sum() / best) > 1 - 1e-5


@each_solver
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gradient_without_a_subspace_leaves_a_usable_basis(solver: Any, bad: float) -> None:
    subspace, weight = make((24, 40), solver=solver, every=1), torch.zeros(24, 40)
    spoiled = gradient_of((24, 40), 0) * 0.0
    spoiled[3, 4] = bad
    for step, gradient in enumerate((spoiled, gradient_of((24, 40), 1), spoiled)):
        before = {name: tensor.clone() for name, tensor in subspace.tensors().items()}
        subspace.begin_step(step)
        subspace.receive(gradient)
        subspace.apply(weight, torch.zeros(subspace.shape), lr=1.0)
        basis = subspace.tensors()["basis"]
        assert (basis.t() @ basis - torch.eye(5)).abs().max() < 1e-5
        if step == 2:
            assert torch.equal(basis, before["basis"])


@each_solver
def test_a_step_without_a_gradient_leaves_the_refresh_to_the_next_one(solver: Any) -> None:
    found = []
    for window in ([0], [None, 0]):
        subspace = make((24, 40), solver=solver, every=9)
        for step, seed in enumerate(window):
            subspace.begin_step(step)
            gradient = gradient_of((24, 40), 0)
            subspace.receive(gradient * 0.0 if seed is None else gradient)
            subspace.clear()
        assert subspace.refresh_count == 1
        found.append(subspace.tensors()["basis"])
    assert torch.equal(*found)
    # no more is kept than the basis: the solver's other vectors are gone
    assert found[0].untyped_storage().nbytes() == found[0].numel() * 4


def test_gram_bases_keep_their_signs() -> None:
    subspace = make((24, 40), every=1)
    bases = []
    for step in range(5):
        subspace.begin_step(step)
        subspace.receive(gradient_of((24, 40), step))
        bases.append(subspace.tensors()["basis"].clone())
    for old, new in pairwise(bases):
        assert not torch.equal(old, new)
        assert ((old * new).sum(dim=0) >= 0).all()


@each_solver
@pytest.mark.parametrize("state_format", ["float32", "int8"])
@pytest.mark.parametrize("saved_at", [2, 4])
def test_resume_in_the_middle_of_an_interval(solver: Any, state_format: str, saved_at: int) -> None:
    shape = (72, 1100)  # moments of [5, 1100] are enough for int8
    runs = []
    for stop in (0, saved_at):
        weight, subspace = parameter(shape), make(shape, solver=solver)
        optimizer = optimizer_of(weight, subspace, state_format=state_format)
        train(weight, subspace, optimizer, range(stop or 8))
        if stop:
            file = io.BytesIO()
            state = {"w": weight.data, "s": subspace.state_dict(), "o": optimizer.state_dict()}
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            weight, subspace = nn.Parameter(state["w"]), make(shape, solver=solver)
            optimizer = optimizer_of(weight, subspace, state_format=state_format)
            subspace.load_state_dict(state["s"])
            optimizer.load_state_dict(state["o"])
            train(weight, subspace, optimizer, range(stop, 8))
        runs.append(weight)
    assert torch.equal(runs[0], runs[1])


def test_a_step_lies_in_the_subspace_and_the_gradient_is_untouched() -> None:
    for shape in SHAPES:
        weight, subspace = parameter(shape), make(shape)
        optimizer = optimizer_of(weight, subspace, weight_decay=0.0, lr=1.0)
        before = weight.detach().clone()
        train(weight, subspace, optimizer, range(1))
        assert weight.grad is not None
        assert torch.equal(weight.grad, gradient_of(shape, 0))
        moved = (weight.detach() - before).double()
        moved = moved if subspace.is_left else moved.t()
        basis = subspace.tensors()["basis"].double()
        assert (moved - basis @ (basis.t() @ moved)).norm() < 1e-5 * moved.norm()


def test_what_is_wrong_is_named() -> None:
    for options, words in (
        ({"rank": 0}, "rank is 0"),
        ({"rank": 24}, "rank is 24"),
        ({"every": 0}, "every is 0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"solver": "qr"}, "solver is 'qr'"),
        ({"basis": "int3"}, "basis is 'int3'"),
    ):
        with pytest.raises(ValueError, match=words):
            make((24, 40), **options)
    subspace = make((24, 40))
    with pytest.raises(RuntimeError, match="begin_step"):
        subspace.receive(torch.zeros(24, 40))
    with pytest.raises(ValueError, match="the gradient is"):
        subspace.receive(torch.zeros(40, 24))
    with pytest.raises(RuntimeError, match="call receive"):
        subspace.apply(torch.zeros(24, 40), torch.zeros(5, 40), lr=1.0)
    subspace.set_basis(torch.eye(24))
    with pytest.raises(ValueError, match="saved basis"):
        make((24, 40)).load_state_dict(subspace.state_dict())


@each_shape
@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_real_and_fake(shape: tuple[int, int], solver: Any, dtype: torch.dtype) -> None:
    seen = []
    for fake in (False, True):
        with FakeTensorMode() if fake else contextlib.nullcontext():
            weight, gradient = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
            subspace = make(shape, solver=solver)
            direction = torch.zeros(subspace.shape)
            numbers = []
            with LiveBytes([weight, gradient, direction]) as live:
                for step in (0, 1, 3):
                    subspace.begin_step(step)
                    subspace.receive(gradient)
                    numbers += [live.peak_bytes, live.live_bytes]
                    subspace.apply(weight, direction, lr=0.1)
                    numbers += [live.peak_bytes, live.live_bytes]
        seen.append(numbers)
    assert seen[0] == seen[1]
    basis, low_rank = 4 * 5 * min(shape), 4 * 5 * max(shape)
    assert seen[0][1] == basis + low_rank
    assert seen[0][3] == seen[0][11] == basis
