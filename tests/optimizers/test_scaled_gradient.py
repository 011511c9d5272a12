"""APOLLO's projection against its equations in fp64, its limiter, its randomness and its bytes."""

from __future__ import annotations

import io
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memrt.kernels import mixed_precision
from memrt.kernels.stochastic_rounding import Rounding
from memrt.optimizers import formed_projection
from memrt.optimizers.norm_growth import NormGrowthLimiter
from memrt.optimizers.scaled_gradient import ScaledGradient, scaling
from tests.kernels.live_bytes import LiveBytes
from tests.optimizers.test_formed_subspace import (
    SETTINGS,
    gradient_of,
    optimizer_of,
    parameter,
    train,
)

SHAPES = [(24, 40), (40, 24), (32, 32), (3, 101), (101, 3), (2, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_granularity = pytest.mark.parametrize("granularity", ["channel", "tensor"])


def make(shape: tuple[int, int], **options: Any) -> ScaledGradient:
    rank = 1 if options.get("granularity") == "tensor" else min(4, min(shape) - 1)
    return ScaledGradient(shape, **({"rank": rank, "every": 3, "scale": 2.0} | options))


class Written:
    """The paper's equations for one weight, in fp64; P comes from the projection under test."""

    def __init__(self, weight: Tensor, *, granularity: str, growth: float, scale: float) -> None:
        self.weight = weight.detach().double().clone()
        self.left = weight.shape[0] < weight.shape[1]
        self.granularity, self.growth, self.scale = granularity, growth, scale
        self.m = self.v = torch.zeros((), dtype=torch.float64)
        self.t, self.last = 0, 0.0

    def step(self, gradient: Tensor, projector: Tensor) -> float:
        g, p = gradient.double(), projector.double()
        r = p.t() @ g if self.left else g @ p
        self.t += 1
        beta1, beta2 = SETTINGS["betas"]
        self.m = beta1 * self.m + (1 - beta1) * r
        self.v = beta2 * self.v + (1 - beta2) * r * r
        correct1, correct2 = 1 - beta1**self.t, 1 - beta2**self.t
        n = (self.m / correct1) / ((self.v / correct2).sqrt() + SETTINGS["eps"])
        correction = sqrt(correct2) / correct1
        raw = n / correction  # without the correction: the limiter's
        dim = 0 if self.left else 1
        if self.granularity == "tensor":
            s = raw.norm() / (r.norm() + 1e-8)
        else:
            s = raw.norm(dim=dim, keepdim=True) / (r.norm(dim=dim, keepdim=True) + 1e-8)
        u = g * s
        norm = float(u.norm())
        if self.last > 0 and norm > self.growth * self.last:
            u *= self.growth * self.last / norm
        self.last = float(u.norm()) or self.last
        lr = SETTINGS["lr"]
        self.weight *= 1 - lr * SETTINGS["weight_decay"]
        self.weight -= lr * sqrt(self.scale) * correction * u
        return norm


@each_shape
@each_granularity
@pytest.mark.parametrize("growth", [1.01, 1e9])
def test_it_is_the_papers_equations(
    shape: tuple[int, int], granularity: Any, growth: float
) -> None:
    """Through three draws of P; every seventh element of the gradient grows tenfold on the way."""
    weight, projection = parameter(shape), make(shape, granularity=granularity, growth=growth)
    optimizer = optimizer_of(weight, projection)
    written = Written(weight, granularity=granularity, growth=growth, scale=2.0)
    limited = 0
    for step in range(9):
        gradient = gradient_of(shape, step)
        gradient.view(-1)[::7] *= 10.0 ** (step % 4)
        projection.begin_step(step)
        weight.grad = gradient.clone()
        optimizer.step()
        before = written.last
        limited += written.step(gradient, projection.projector()) > before * growth > 0
        # every number of an update has passed a handful of fp32 sums of at most 101 elements
        atol = (step + 1) * 2**-24 * (4 + 1e-2 * 64 * 101)
        torch.testing.assert_close(weight.detach().double(), written.weight, rtol=0, atol=atol)
        assert torch.equal(weight.grad, gradient)
    assert projection.draw_count == 3
    assert limited >= 3 if growth < 2 else limited == 0


@each_shape
def test_with_the_identity_it_scales_by_adamws_own_ratio(shape: tuple[int, int]) -> None:
    """R = G: each channel of the step is as long as AdamW's, along the gradient."""
    weight, plain = parameter(shape), parameter(shape)
    projection = make(shape, scale=1.0, growth=None)
    projection.set_projector(torch.eye(min(shape)))
    settings = {"weight_decay": 0.0}
    optimizer = optimizer_of(weight, projection, **settings)
    other = torch.optim.AdamW([plain], **{**SETTINGS, **settings})
    dim = 0 if shape[0] < shape[1] else 1
    for step in range(4):
        before = [x.detach().double().clone() for x in (weight, plain)]
        projection.begin_step(step)
        weight.grad, plain.grad = gradient_of(shape, step), gradient_of(shape, step)
        optimizer.step()
        other.step()
        ours, theirs = weight.detach().double() - before[0], plain.detach().double() - before[1]
        torch.testing.assert_close(ours.norm(dim=dim), theirs.norm(dim=dim), rtol=1e-3, atol=1e-6)
        cosine = torch.nn.functional.cosine_similarity(ours, -weight.grad.double(), dim=dim)
        assert float(cosine.min()) > 1 - 1e-5


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_factors_are_the_root_of_rank_over_size_of_the_full_ones(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(256, 300, generator=generator)
    projection = make((256, 300), rank=rank, growth=None)
    projection.begin_step(0)
    projection.receive(gradient)
    low_rank = projection.gradient()
    assert low_rank is not None
    options: dict[str, Any] = {"granularity": "channel", "left": True}
    found = scaling(torch.sign(low_rank), low_rank, **options)
    full = scaling(torch.sign(gradient), gradient, **options)
    # inverse squares: those of a sketch's lengths are true in the mean
    ratio = float((full / found).square().mean().rsqrt())
    assert ratio == pytest.approx(sqrt(rank / 256), rel=0.15)


def test_projectors_differ_between_weights_seeds_and_draws_and_have_variance_one_over_rank() -> (
    None
):
    found = []
    for options in ({}, {"index": 1}, {"seed": 1}):
        projection = make((300, 400), rank=8, every=1, **options)
        for step in range(2):
            projection.begin_step(step)
            projection.receive(torch.ones(300, 400))
            found.append(projection.projector())
            projection.clear()
            assert torch.equal(projection.projector(), found[-1])
    for i, one in enumerate(found):
        assert float(one.var()) == pytest.approx(1 / 8, rel=0.1)
        for other in found[:i]:
            assert abs(float((one * other).mean())) < 5 / 8 / sqrt(300 * 8)


def test_a_gradient_that_explodes_grows_by_one_percent_a_step() -> None:
    limiter, last = NormGrowthLimiter(1.01), 0.0
    for step in range(30):
        norm = torch.tensor(10.0**step)
        passed = float(limiter.factor(norm) * norm)
        if step:
            assert passed <= 1.01 * last * (1 + 1e-5)
        last = passed
    assert last == pytest.approx(1.01**29, rel=1e-4)


def test_a_smaller_norm_passes_and_a_zero_one_is_not_remembered() -> None:
    limiter = NormGrowthLimiter(1.01)
    norms = [4.0, 3.0, 0.0, 3.0, 9.0]
    passed = [float(limiter.factor(torch.tensor(norm)) * norm) for norm in norms]
    assert passed == pytest.approx([4.0, 3.0, 0.0, 3.0, 3.03])
    limiter.forget()
    assert limiter.tensors() == {}
    assert float(limiter.factor(torch.tensor(0.0))) == 1.0
    assert float(limiter.factor(torch.tensor(100.0))) == 1.0
    with pytest.raises(ValueError, match=r"growth is 1\.0"):
        NormGrowthLimiter(1.0)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("state_format", ["float32", "int8"])
@pytest.mark.parametrize("saved_at", [2, 3, 4])
def test_resume_changes_no_bit(granularity: Any, state_format: str, saved_at: int) -> None:
    shape, runs = (72, 1100), []
    for stop in (0, saved_at):
        weight, projection = parameter(shape), make(shape, granularity=granularity, seed=5)
        optimizer = optimizer_of(weight, projection, state_format=state_format)
        train(weight, projection, optimizer, range(stop or 7))
        if stop:
            file = io.BytesIO()
            state = {"w": weight.data, "p": projection.state_dict(), "o": optimizer.state_dict()}
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            weight, projection = nn.Parameter(state["w"]), make(shape, granularity=granularity)
            optimizer = optimizer_of(weight, projection, state_format=state_format)
            projection.load_state_dict(state["p"])
            optimizer.load_state_dict(state["o"])
            train(weight, projection, optimizer, range(stop, 7))
        runs.append(weight)
    assert torch.equal(runs[0], runs[1])


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_mini_keeps_two_numbers_a_channel_and_one_more(shape: tuple[int, int]) -> None:
    weight, projection = parameter(shape, torch.bfloat16), make(shape, granularity="tensor")
    optimizer = optimizer_of(weight, projection)
    train(weight, projection, optimizer, range(2))
    moments = [t for name, t in optimizer.state[weight].items() if name != "step"]
    assert sum(t.numel() * t.element_size() for t in moments) == 8 * 64
    assert [t.numel() for t in projection.tensors().values()] == [1]


class NoHostRead(TorchDispatchMode):
    """Refuses what waits for a device: reading a number, comparing, moving to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func._opname not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"), func
        if func._opname == "_to_copy":
            assert torch.device(kwargs.get("device") or args[0].device) == args[0].device
        return func(*args, **kwargs)


@each_granularity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_reads_nothing_on_the_host(granularity: Any, dtype: torch.dtype) -> None:
    weight, projection = parameter((24, 40), dtype), make((24, 40), granularity=granularity)
    optimizer = optimizer_of(weight, projection)
    with NoHostRead():
        train(weight, projection, optimizer, range(4))
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(weight.sum())
    assert projection.draw_count == 2


@each_granularity
def test_a_step_on_a_gpu_mixes_no_devices(
    granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors, which refuse to mix and have no values to read; products have no fakes here."""
    zeros = torch.zeros

    def project(gradient: Tensor, basis: Tensor, *, left: bool) -> Tensor:
        return zeros(basis.shape[1], gradient.shape[1], device=gradient.device)

    monkeypatch.setattr(formed_projection, "project_gradient", project)
    with FakeTensorMode():
        projection = make((24, 40), granularity=granularity, device="cuda")
        weight = zeros(24, 40, dtype=torch.bfloat16, device="cuda")
        number = zeros((), device="cuda")
        projection.begin_step(0)
        projection.receive(zeros(24, 40, dtype=torch.bfloat16, device="cuda"))
        direction = projection.gradient()
        assert direction is not None
        options: dict[str, Any] = {"correction": number, "rounding": Rounding((1, 2), number)}
        projection.apply(weight, direction, lr=0.1, decay=0.9, **options)
    assert projection.tensors()["norm"].device.type == "cuda"


@pytest.mark.parametrize("shape", [(16, 4096), (4096, 16)])
def test_a_bf16_weight_is_not_copied(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is alive in a step are a few numbers a channel, and a piece of the gradient for R."""
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", 4096)
    weight, projection = parameter(shape, torch.bfloat16), make(shape, granularity="tensor")
    optimizer = optimizer_of(weight, projection)
    train(weight, projection, optimizer, range(2))
    projection.begin_step(2)
    weight.grad = gradient_of(shape, 2, torch.bfloat16)
    with LiveBytes([weight, weight.grad]) as live:
        optimizer.step()
    assert 0 < live.peak_bytes <= 4 * 4096 * 8
    assert weight.numel() == 4096 * 16


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_single_rows_and_columns(shape: tuple[int, int]) -> None:
    weight, projection = parameter(shape), make(shape, rank=1)
    before = weight.detach().clone()
    train(weight, projection, optimizer_of(weight, projection), range(4))
    assert bool(torch.isfinite(weight).all())
    assert not torch.equal(weight, before)


def test_what_is_wrong_is_named() -> None:
    for options, words in (
        ({"rank": 0}, "rank is 0"),
        ({"rank": 25}, "rank is 25"),
        ({"every": 0}, "every is 0"),
        ({"scale": -1.0}, r"scale is -1\.0"),
        ({"granularity": "row"}, "granularity is 'row'"),
        ({"growth": 0.5}, r"growth is 0\.5"),
    ):
        with pytest.raises(ValueError, match=words):
            make((24, 40), **options)
    projection = make((24, 40))
    with pytest.raises(RuntimeError, match="begin_step"):
        projection.receive(torch.zeros(24, 40))
    with pytest.raises(ValueError, match="P is"):
        projection.set_projector(torch.eye(40))
    projection.begin_step(0)
    state = projection.state_dict() | {"norm": torch.zeros(3)}
    with pytest.raises(ValueError, match="saved norm"):
        projection.load_state_dict(state)
