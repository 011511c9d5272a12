"""Subspaces under clipping, low precision, bad gradients, wrong arguments and fake tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.kernels import mixed_precision
from memrt.kernels.gradient_products import gradient_squared_norm
from memrt.kernels.projected_linear import projected_linear
from memrt.optimizers.basis import BasisFormat
from memrt.optimizers.formed_subspace import FormedSubspace
from memrt.optimizers.projection import Projection
from memrt.optimizers.subspace import Subspace
from tests.kernels.live_bytes import LiveBytes

SHAPES = [(24, 40), (40, 24), (32, 32)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape: tuple[int, int] = (24, 40), **options: Any) -> Subspace:
    return Subspace(shape, **({"rank": 5, "every": 3} | options))


def factors(shape: tuple[int, int], *, tokens: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(tokens, size, generator=generator) for size in shape)
    return rows, columns


def begun(shape: tuple[int, int] = (24, 40), **options: Any) -> Subspace:
    subspace = make(shape, **options)
    subspace.begin_step(0)
    return subspace


def held(subspace: Subspace, name: str) -> Tensor:
    return subspace.tensors()[name]


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def projected(subspace: Subspace, rows: Tensor, columns: Tensor) -> Tensor:
    basis, gradient = held(subspace, "basis").double(), rows.double().t() @ columns.double()
    return basis.t() @ gradient if subspace.side == "left" else gradient @ basis


@each_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_every_dtype_is_summed_in_fp32_with_autocast_off(
    shape: tuple[int, int], dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", 1000)  # a few tokens at a time
    subspace = begun(shape)
    batches = [tuple(x.to(dtype) for x in factors(shape, seed=seed)) for seed in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for rows, columns in batches:
            subspace.accumulate(rows, columns)
    assert held(subspace, "gradient").dtype == held(subspace, "basis").dtype == torch.float32
    truth = sum(projected(subspace, *batch) for batch in batches)
    assert isinstance(truth, Tensor)
    assert relative(held(subspace, "gradient"), truth) < 1e-6


@each_shape
def test_a_bfloat16_basis_costs_its_own_rounding_and_no_more(shape: tuple[int, int]) -> None:
    subspace = begun(shape, basis="bfloat16")
    rows, columns = factors(shape)
    subspace.accumulate(rows, columns)
    basis = held(subspace, "basis")
    assert basis.dtype == torch.bfloat16
    gram = basis.double().t() @ basis.double()
    assert (gram - torch.eye(5)).abs().max() < torch.finfo(torch.bfloat16).eps
    assert relative(held(subspace, "gradient"), projected(subspace, rows, columns)) < 1e-6
    weight = torch.zeros(shape)
    subspace.apply(weight, held(subspace, "gradient"), lr=1.0)
    left = subspace.side == "left"
    gradient = held(subspace, "gradient")
    lifted = basis.float() @ gradient if left else gradient @ basis.float().t()
    torch.testing.assert_close(weight, -lifted)


@each_shape
@pytest.mark.parametrize("tokens", [3, 40, 700])  # Gram matrices where tokens are few, else tiles
@pytest.mark.parametrize("block", [64, 4000, 2**23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_exact_norm_without_the_gradient(
    shape: tuple[int, int],
    tokens: int,
    block: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", block)
    rows, columns = (x.to(dtype) for x in factors(shape, tokens=tokens))
    truth = (rows.double().t() @ columns.double()).square().sum()
    assert relative(gradient_squared_norm(rows, columns), truth) < 3e-6
    subspace = begun(shape, norm="exact")
    subspace.accumulate(rows, columns)
    assert relative(subspace.squared_norm(), truth) < 3e-6


def test_clipping_scales_the_gradient_and_its_norm() -> None:
    for norm in ("projected", "exact"):
        for factor in (0.25, torch.tensor(0.25)):
            subspace = begun(norm=norm)
            assert subspace.squared_norm() == 0.0
            subspace.accumulate(*factors((24, 40)))
            before, gradient = subspace.squared_norm(), held(subspace, "gradient").clone()
            assert before.shape == ()
            assert before.dtype == torch.float32
            if norm == "projected":
                torch.testing.assert_close(before, gradient.square().sum())
            else:
                assert before > gradient.square().sum()
            subspace.scale_gradient_(factor)
            assert torch.equal(held(subspace, "gradient"), gradient * 0.25)
            torch.testing.assert_close(subspace.squared_norm(), before / 16)
            subspace.clear()
            assert subspace.squared_norm() == 0.0


def test_the_exact_norm_refuses_a_second_micro_batch() -> None:
    subspace = begun(norm="exact")
    subspace.accumulate(*factors((24, 40)))
    gradient = held(subspace, "gradient").clone()
    with pytest.raises(RuntimeError, match="single micro-batch"):
        subspace.accumulate(*factors((24, 40)))
    assert torch.equal(held(subspace, "gradient"), gradient)
    subspace.clear()
    subspace.begin_step(1)
    subspace.accumulate(*factors((24, 40)))


@each_shape
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_in_all_directions_is_descent(shape: tuple[int, int], momentum: float) -> None:
    """With any orthonormal basis of full rank, and rules that are linear in the gradient: P Pᵀ = I.

    The reference is torch's SGD in fp64. Adam's rule is not linear: rotated it is another one.
    """
    noise = torch.randn(min(shape), min(shape), generator=torch.Generator().manual_seed(5))
    basis = torch.linalg.qr(noise.double()).Q.float()
    formed = FormedSubspace(shape, rank=5, every=3)
    sketched = make(shape)
    for each in (formed, sketched):
        each.set_basis(basis)
    plain = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = torch.optim.SGD([plain], lr=0.01, momentum=momentum)
    ours = [torch.ones(shape), torch.ones(shape)]
    means = [torch.zeros(each.shape) for each in (formed, sketched)]
    moved = 0.0
    for step in range(6):
        rows, columns = factors(shape, seed=step)
        plain.grad = rows.double().t() @ columns.double()
        for each in (formed, sketched):
            each.begin_step(step)
        formed.receive(rows.t() @ columns)
        sketched.accumulate(rows, columns)
        for each, weight, mean in zip((formed, sketched), ours, means, strict=True):
            gradient = each.gradient()
            assert gradient is not None
            mean.mul_(momentum).add_(gradient)
            each.apply(weight, mean, lr=0.01)
            each.clear()
        optimizer.step()
        moved += float(plain.grad.abs().max()) * 0.01 / (1 - momentum)
    for weight in ours:
        # two products of 32 terms and QR's own error, in fp32, of all that moved
        limit = 4 * min(shape) * torch.finfo(torch.float32).eps * (1 + moved)
        assert float((weight - plain).detach().abs().max()) <= limit


def test_an_identity_basis_is_adam() -> None:
    def adam(gradient: Tensor, moments: dict[str, Tensor], step: int) -> Tensor:
        moments["first"] = moments.get("first", torch.zeros(())) * 0.9 + 0.1 * gradient
        moments["second"] = moments.get("second", torch.zeros(())) * 0.99 + 0.01 * gradient**2
        corrected = moments["second"] / (1 - 0.99**step)
        return moments["first"] / (1 - 0.9**step) / (corrected.sqrt() + 1e-8)

    for shape in SHAPES:
        subspace = make(shape)
        subspace.set_basis(torch.eye(min(shape)))
        assert subspace.shape == shape
        ours, plain = torch.ones(shape), torch.ones(shape)
        states: list[dict[str, Tensor]] = [{}, {}]
        for step in range(6):
            rows, columns = factors(shape, seed=step)
            subspace.begin_step(step)
            subspace.accumulate(rows, columns)
            subspace.apply(ours, adam(held(subspace, "gradient"), states[0], step + 1), lr=0.01)
            subspace.clear()
            plain -= 0.01 * adam(rows.t() @ columns, states[1], step + 1)
        assert subspace.refresh_count == 0
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_gradient_without_a_subspace_leaves_a_usable_basis(bad: float) -> None:
    rows, columns = factors((24, 40))
    spoiled = rows * 0.0 if bad == 0.0 else torch.where(rows > 2.0, bad, rows)
    subspace = begun(every=1)
    subspace.accumulate(spoiled, columns)
    basis = held(subspace, "basis")
    assert (basis.t() @ basis - torch.eye(5)).abs().max() < 1e-5
    subspace.clear()
    subspace.begin_step(1)
    subspace.accumulate(rows, columns)
    subspace.clear()
    found = held(subspace, "basis").clone()
    subspace.begin_step(2)
    subspace.accumulate(spoiled, columns)
    assert torch.equal(held(subspace, "basis"), found)


@pytest.mark.parametrize("step", [0, 3], ids=["first", "refresh"])
@pytest.mark.parametrize("basis", ["float32", "int4"])
def test_a_micro_batch_without_a_gradient_leaves_the_refresh_to_the_next(
    step: int, basis: BasisFormat
) -> None:
    """Labels that are all masked, or an expert without a token: as if it had not been there."""
    rows, columns = factors((24, 40))
    found = []
    for window in ([rows], [rows * 0.0, rows, rows * 0.0]):
        subspace = make(basis=basis, lazy=1.0, rotates=True)
        for earlier in range(step):
            subspace.begin_step(earlier)
            subspace.accumulate(*factors((24, 40), seed=earlier + 1))
            subspace.take_rotation()
            subspace.clear()
        subspace.begin_step(step)
        for part in window:
            subspace.accumulate(part, columns)
        found.append(subspace)
    ours, other = (each.tensors() for each in found)
    assert ours.keys() == other.keys()
    assert ("rotation" in ours) is ("overlap_0" in ours) is (step > 0)
    assert all(torch.equal(other[name], tensor) for name, tensor in ours.items())
    assert found[0].refresh_count == found[1].refresh_count == 1 + step // 3


@pytest.mark.parametrize("bad", [0.0, float("nan")])
@pytest.mark.parametrize("step", [0, 3], ids=["first", "refresh"])
def test_a_step_without_a_gradient_leaves_it_to_the_next_one_over_a_resume_too(
    bad: float, step: int
) -> None:
    rows, columns = factors((24, 40))
    never, with_it = make(every=3), make(every=3)
    for subspace in (never, with_it):
        for earlier in range(step):
            subspace.begin_step(earlier)
            subspace.accumulate(*factors((24, 40), seed=earlier + 1))
            subspace.clear()
        subspace.begin_step(step)
    with_it.accumulate(rows * bad, columns)
    gradient = with_it.gradient()
    assert gradient is not None
    assert bool(torch.isfinite(gradient).all()) is (bad == 0.0)
    with_it.clear()
    resumed = make(every=3)
    resumed.load_state_dict(with_it.state_dict())
    for later in (with_it, resumed):
        later.begin_step(step + 1)
    for subspace in (never, with_it, resumed):
        subspace.accumulate(rows, columns)
        subspace.clear()
    for later in (with_it, resumed):
        assert torch.equal(held(later, "basis"), held(never, "basis"))
        assert later.state_dict().keys() == never.state_dict().keys()
        assert not later.state_dict()["refresh_pending"]


@pytest.mark.parametrize("size", [1e-28, 1e18])
def test_gradients_of_any_size_have_the_same_subspace(size: float) -> None:
    rows, columns = factors((24, 40))
    bases = []
    for factor in (1.0, size):
        subspace = begun()
        subspace.accumulate(rows * factor, columns)
        bases.append(held(subspace, "basis"))
    assert torch.linalg.svdvals(bases[0].t() @ bases[1]).min() > 0.9999


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_fewer_tokens_than_the_rank(tokens: int) -> None:
    subspace = begun()
    rows, columns = factors((24, 40), tokens=tokens)
    subspace.accumulate(rows, columns)
    basis = held(subspace, "basis")
    assert (basis.t() @ basis - torch.eye(5)).abs().max() < 1e-5
    full = float((rows.t() @ columns).square().sum())
    assert float(subspace.squared_norm()) == pytest.approx(full, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 24}, "rank is 24"),
        ({"every": 0}, "every is 0"),
        ({"every": 3, "offset": 3}, "offset 3"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"norm": "frobenius"}, "norm is 'frobenius'"),
        ({"basis": "float16"}, "basis is 'float16'"),
        ({"lazy": 0.0}, "lazy is 0.0"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_wrong_tensors_and_a_wrong_order_are_refused() -> None:
    rows, columns = factors((24, 40))
    subspace = make()
    with pytest.raises(RuntimeError, match=r"call begin_step\(\)"):
        subspace.accumulate(rows, columns)
    with pytest.raises(RuntimeError, match="no basis"):
        subspace.apply(torch.zeros(24, 40), torch.zeros(5, 40), lr=1.0)
    subspace.begin_step(0)
    with pytest.raises(ValueError, match="rows are"):
        subspace.accumulate(columns, rows)
    with pytest.raises(ValueError, match="rows are"):
        subspace.accumulate(rows[:3], columns)
    subspace.accumulate(rows, columns)
    with pytest.raises(RuntimeError, match=r"call clear\(\)"):
        subspace.begin_step(1)
    with pytest.raises(RuntimeError, match=r"call clear\(\)"):
        subspace.set_basis(torch.eye(24))
    with pytest.raises(ValueError, match="weight and direction"):
        subspace.apply(torch.zeros(40, 24), torch.zeros(5, 40), lr=1.0)
    subspace.clear()
    with pytest.raises(ValueError, match="basis is"):
        subspace.set_basis(torch.eye(40))
    with pytest.raises(ValueError, match="saved basis"):
        make(rank=4).load_state_dict(subspace.state_dict())
    subspace.set_basis(torch.eye(24))
    with pytest.raises(RuntimeError, match="frozen"):
        subspace.request_refresh()


def bytes_run(shape: tuple[int, int], *, fake: bool, **options: Any) -> list[int]:
    """Return peak and live bytes after a first step, a refresh, and two more micro-batches."""
    mode = FakeTensorMode() if fake else contextlib.nullcontext()
    with mode:
        rows, columns = factors(shape) if not fake else (torch.randn(64, x) for x in shape)
        subspace = make(shape, **options)
        weight = torch.zeros(shape)
        seen = []
        with LiveBytes([rows, columns, weight]) as live:
            for step in (0, 3, 4):
                subspace.begin_step(step)
                subspace.accumulate(rows, columns)
                seen += [live.peak_bytes, live.live_bytes]
                subspace.apply(weight, subspace.tensors()["gradient"], lr=0.1)
                subspace.squared_norm()
                subspace.clear()
                seen += [live.peak_bytes, live.live_bytes]
        return seen


@each_shape
@pytest.mark.parametrize("options", [{}, {"norm": "exact"}, {"basis": "bfloat16"}], ids=str)
def test_bytes_are_those_of_the_docstring_real_and_fake(
    shape: tuple[int, int], options: dict[str, Any]
) -> None:
    real, fake = (bytes_run(shape, fake=fake, **options) for fake in (False, True))
    assert real == fake
    small, large, block = min(shape), max(shape), 5 + 8
    basis = 5 * small * (2 if options.get("basis") else 4)
    scalar = 4 if options.get("norm") else 0
    assert real[1] == basis + 4 * 5 * large + scalar
    assert real[3] == real[11] == basis
    # The refresh at step 3: Gram matrices and eigenvectors are [k, k], products have k a token.
    workspace = 4 * block * (3 * small + large) + 4 * (64 * block + 4 * block * block)
    assert real[4] <= 2 * basis + workspace + (4 * small * large if scalar else 0)


def test_filled_by_a_projected_linear_layer_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 24, generator=generator)
    weight = torch.randn(40, 24, generator=generator).requires_grad_()
    subspace = begun((40, 24))
    projection: Projection = subspace
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = projected_linear(x, weight, None, subspace).float().square().sum()
        loss.backward()
    assert weight.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = 2 * torch.nn.functional.linear(x, weight).float().square().sum()
    loss.backward()
    assert weight.grad is not None
    gradient = projection.gradient()
    assert gradient is not None
    # The plain gradient is rounded to bf16.
    expected = weight.grad @ held(subspace, "basis")
    assert relative(gradient, expected) < torch.finfo(torch.bfloat16).eps
