"""Subspaces of gradients that are never formed, against the formed gradient and its exact SVD."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels import projected_update
from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.optimizers.subspace import Subspace
from tests.kernels.live_bytes import LiveBytes

TOKENS, RANK = 160, 6
SHAPES = [(32, 48), (48, 32), (32, 32), (17, 101), (101, 17), (7, 8)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape: tuple[int, int] = (32, 48), **options: Any) -> Subspace:
    return Subspace(shape, **({"rank": min(RANK, min(shape) - 1), "every": 10} | options))


def factors(
    shape: tuple[int, int], *, seed: int = 0, decay: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return rows and columns whose product has the singular values i ** -decay."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(size: int) -> Tensor:
        matrix = torch.randn(size, min(shape), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(matrix).Q

    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    middle = orthonormal(TOKENS) * values.sqrt()
    rows, columns = middle @ orthonormal(shape[0]).t(), middle @ orthonormal(shape[1]).t()
    return rows.to(dtype), columns.to(dtype)


def formed(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.double().t() @ columns.double()


def basis_of(subspace: Subspace) -> Tensor:
    return subspace.tensors()["basis"]


def gradient_of(subspace: Subspace) -> Tensor:
    gradient = subspace.gradient()
    assert gradient is not None
    return gradient


def project(subspace: Subspace, gradient: Tensor) -> Tensor:
    basis = basis_of(subspace).double()
    return basis.t() @ gradient if subspace.side == "left" else gradient @ basis


def energy(subspace: Subspace, gradient: Tensor) -> float:
    """Return the captured part of the most that any basis of this rank can capture."""
    best = torch.linalg.svdvals(gradient)[: subspace.rank].square().sum()
    return float(project(subspace, gradient).square().sum() / best)


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def steps(subspace: Subspace, first: int, last: int) -> Iterator[Tensor]:
    """Run optimizer steps first to last - 1, a gradient of its own in each."""
    for step in range(first, last):
        subspace.begin_step(step)
        subspace.accumulate(*factors(subspace.weight_shape, seed=step))
        yield gradient_of(subspace).clone()
        subspace.clear()


@each_shape
def test_the_basis_is_orthonormal_and_the_gradient_its_projection(shape: tuple[int, int]) -> None:
    subspace = make(shape)
    subspace.begin_step(0)
    assert subspace.gradient() is None
    rows, columns = factors(shape)
    subspace.accumulate(rows, columns)
    rank = subspace.rank
    assert subspace.side == ("left" if shape[0] < shape[1] else "right")
    assert subspace.shape == ((rank, shape[1]) if shape[0] < shape[1] else (shape[0], rank))
    assert tuple(gradient_of(subspace).shape) == subspace.shape
    basis = basis_of(subspace)
    assert basis.shape == (min(shape), rank)
    assert (basis.t() @ basis - torch.eye(rank)).abs().max() < 1e-5
    assert relative(gradient_of(subspace), project(subspace, formed(rows, columns))) < 1e-6


@each_shape
@pytest.mark.parametrize(("decay", "least"), [(0.5, 0.99), (1.0, 0.999), (2.0, 0.99999)])
def test_a_first_basis_captures_what_an_exact_svd_does(
    shape: tuple[int, int], decay: float, least: float
) -> None:
    subspace = make(shape)
    subspace.begin_step(0)
    rows, columns = factors(shape, decay=decay)
    subspace.accumulate(rows, columns)
    assert energy(subspace, formed(rows, columns)) > least


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_a_refresh_follows_a_gradient_that_moved(decay: float) -> None:
    subspace = make(every=1)
    subspace.begin_step(0)
    rows, columns = factors(subspace.weight_shape, decay=decay)
    subspace.accumulate(rows, columns)
    subspace.clear()
    old = basis_of(subspace).clone()
    for seed, share in ((1, 0.5), (2, 1.0)):  # the second has nothing in common with the first
        others = factors(subspace.weight_shape, seed=seed, decay=decay)
        rows, columns = (
            share * o + (1 - share) * x for x, o in zip((rows, columns), others, strict=True)
        )
        stale = energy(subspace, formed(rows, columns))
        subspace.begin_step(seed)
        subspace.accumulate(rows, columns)
        subspace.clear()
        assert stale < 0.9
        assert energy(subspace, formed(rows, columns)) > 0.98
        basis = basis_of(subspace)
        assert ((basis * old).sum(dim=0) >= 0).all()
        assert (basis.t() @ basis - torch.eye(subspace.rank)).abs().max() < 1e-5
        old = basis.clone()


def test_a_refresh_from_the_same_gradient_keeps_the_signs() -> None:
    bases = []
    subspace = make(every=1)
    for step in range(4):
        subspace.begin_step(step)
        subspace.accumulate(*factors(subspace.weight_shape, decay=2.0))
        subspace.clear()
        bases.append(basis_of(subspace).clone())
    for later in bases[1:]:
        torch.testing.assert_close(later, bases[0], rtol=0, atol=1e-3)


@each_shape
def test_galores_projector_spans_the_same_space(shape: tuple[int, int]) -> None:
    projector = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector
    subspace = make(shape)
    rows, columns = factors(shape, decay=2.0)
    gradient = formed(rows, columns).float()
    theirs = projector(rank=subspace.rank, scale=0.25)
    low_rank = theirs.project(gradient, 0)
    subspace.begin_step(0)
    subspace.accumulate(rows, columns)
    their_basis = theirs.ortho_matrix if subspace.side == "left" else theirs.ortho_matrix.t()
    # Cosines of the principal angles: all 1 where the spaces are one.
    cosines = torch.linalg.svdvals(their_basis.t() @ basis_of(subspace))
    assert cosines.min() > 0.9999
    assert low_rank.shape == subspace.shape
    assert relative(gradient_of(subspace).norm(), low_rank.norm()) < 1e-4
    weight = torch.zeros(shape)
    subspace_weight = torch.zeros(shape)
    weight -= 0.1 * theirs.project_back(low_rank)
    scaled = make(shape, scale=0.25)
    scaled.set_basis(basis_of(subspace))
    scaled.apply(subspace_weight, gradient_of(subspace), lr=0.1)
    assert relative(subspace_weight, weight) < 1e-2


@each_shape
def test_four_quarter_batches_make_one_step(shape: tuple[int, int]) -> None:
    rows, columns = factors(shape)
    whole, split = make(shape), make(shape)
    whole.begin_step(0)
    whole.accumulate(rows, columns)
    split.set_basis(basis_of(whole), frozen=False)
    split.begin_step(1)
    for quarter in range(4):
        part = slice(quarter * TOKENS // 4, (quarter + 1) * TOKENS // 4)
        split.accumulate(rows[part], columns[part])
    assert split.refresh_count == 0
    assert relative(gradient_of(split), gradient_of(whole)) < 1e-6


@each_shape
def test_an_update_lies_in_the_basis(shape: tuple[int, int]) -> None:
    subspace = make(shape, scale=0.5)
    subspace.begin_step(0)
    subspace.accumulate(*factors(shape))
    weight = torch.zeros(shape, requires_grad=True)
    direction = torch.sign(gradient_of(subspace))
    subspace.apply(weight, direction, lr=0.1)
    basis = basis_of(subspace)
    left = subspace.side == "left"
    lifted = basis @ direction if left else direction @ basis.t()
    torch.testing.assert_close(weight.detach(), -0.05 * lifted)
    update = weight.detach() if left else weight.detach().t()
    assert (update - basis @ (basis.t() @ update)).norm() < 1e-5 * update.norm()
    assert torch.linalg.matrix_rank(update, rtol=1e-5) <= subspace.rank


def test_narrow_weights_are_updated_in_fp32_and_rounded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projected_update, "PIECE_ELEMENTS", 100)
    for shape in SHAPES:
        subspace = make(shape)
        subspace.begin_step(0)
        subspace.accumulate(*factors(shape))
        wide = torch.randn(shape).bfloat16().float()
        narrow = wide.bfloat16()
        direction = torch.randn(subspace.shape)
        subspace.apply(wide, direction, lr=0.1)
        subspace.apply(narrow, direction, lr=0.1)
        assert torch.equal(narrow, wide.bfloat16())


def test_decay_and_stochastic_rounding_need_no_copy_of_the_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bits of an fp32 copy that is decayed, stepped and rounded at the end."""
    monkeypatch.setattr(projected_update, "PIECE_ELEMENTS", 100)
    way = Rounding((1234, 5678), torch.tensor(3.0))
    for shape in SHAPES:
        subspace = make(shape)
        subspace.begin_step(0)
        subspace.accumulate(*factors(shape))
        wide = torch.randn(shape).bfloat16().float()
        narrow, expected = wide.bfloat16(), wide.bfloat16()
        direction = torch.randn(subspace.shape)
        wide.mul_(0.9)
        subspace.apply(wide, direction, lr=0.1)
        stochastic_copy_(expected, wide, rounding=way)
        with LiveBytes([narrow, direction, way.step, basis_of(subspace)]) as live:
            subspace.apply(narrow, direction, lr=0.1, decay=0.9, rounding=way)
        assert torch.equal(narrow, expected)
        assert not torch.equal(narrow, wide.bfloat16())
        assert live.peak_bytes == 0


def test_refreshes_come_at_step_zero_and_then_every_interval_from_the_offset() -> None:
    for every, offset, expected in (
        (4, 0, [0, 4, 8, 12]),
        (4, 3, [0, 3, 7, 11]),
        (1, 0, list(range(13))),
    ):
        subspace = make(every=every, offset=offset)
        counts = [subspace.refresh_count for _ in steps(subspace, 0, 13)]
        refreshed = [i for i, count in enumerate(counts) if count > (counts[i - 1] if i else 0)]
        assert refreshed == expected


def test_one_refresh_a_step_and_a_missed_one_is_made_up_for() -> None:
    subspace = make(every=4)
    subspace.begin_step(0)
    for _ in range(3):
        subspace.accumulate(*factors(subspace.weight_shape))
    subspace.clear()
    assert subspace.refresh_count == 1
    subspace.begin_step(4)  # no gradient arrives
    subspace.clear()
    subspace.begin_step(5)
    subspace.accumulate(*factors(subspace.weight_shape))
    subspace.clear()
    assert subspace.refresh_count == 2
    subspace.request_refresh()
    assert len(list(steps(subspace, 6, 7))) == 1
    assert subspace.refresh_count == 3


@pytest.mark.parametrize("saved_at", [2, 4, 5])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(saved_at: int) -> None:
    options = {"every": 4, "offset": 1, "seed": 7, "index": 3}
    expected = list(steps(make(**options), 0, 12))
    first, second = make(**options), make(**options)
    begun = list(steps(first, 0, saved_at))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    resumed = begun + list(steps(second, saved_at, 12))
    assert all(torch.equal(x, y) for x, y in zip(resumed, expected, strict=True))
    assert first.tensors().keys() == {"basis"}
    assert basis_of(first).data_ptr() != basis_of(second).data_ptr()


def test_the_same_bits_again_whatever_the_global_generator_and_other_bits_for_another_index() -> (
    None
):
    runs = []
    for global_seed, index in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        subspace = make(seed=5, index=index, every=2)
        runs.append(torch.stack(list(steps(subspace, 0, 5))))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
