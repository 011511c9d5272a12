"""Operations on a gradient by channel, against their formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memrt.kernels import mixed_precision
from memrt.kernels.formed_gradient import add_channels_, channel_norms, gram, project_gradient

EPS = 2**-24
SHAPES = [(24, 67), (67, 24), (32, 32), (1, 7), (7, 1)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=[64, 2**25], ids=["blocks", "whole"], autouse=True)
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", request.param)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@each_shape
@each_dtype
@pytest.mark.parametrize("contiguous", [True, False])
def test_projection(shape: tuple[int, int], dtype: torch.dtype, contiguous: bool) -> None:
    left, rank = shape[0] < shape[1], min(5, min(shape))
    gradient = normal(*shape, dtype=dtype) if contiguous else normal(*shape[::-1], dtype=dtype).t()
    basis = normal(min(shape), rank, seed=1)
    found = project_gradient(gradient, basis, left=left)
    wide, lift = gradient.double(), basis.double()
    expected = lift.t() @ wide if left else wide @ lift
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * 24 * EPS * 9)


@each_shape
@each_dtype
def test_norms_and_scaling_by_channel(shape: tuple[int, int], dtype: torch.dtype) -> None:
    left, dim = shape[0] < shape[1], 0 if shape[0] < shape[1] else 1
    gradient = normal(*shape, dtype=dtype)
    norms = channel_norms(gradient, left=left)
    torch.testing.assert_close(norms.double(), gradient.double().norm(dim=dim), rtol=1e-6, atol=0)
    for factors in (normal(max(shape), seed=2), torch.tensor(0.37)):
        weight = normal(*shape, seed=3, dtype=dtype)
        by_hand = factors if factors.dim() == 0 else factors.unsqueeze(dim)
        expected = weight.double() - 0.5 * gradient.double() * by_hand.double()
        add_channels_(weight, gradient, factors, alpha=-0.5, left=left)
        assert weight.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(weight.double(), expected, rtol=4 * EPS, atol=16 * EPS)
        else:  # one rounding, of the fp32 sum
            assert float((weight.double() - expected).abs().max()) <= 2**-8 * 16
            near = (weight.double() - expected).abs() <= 2**-8 * expected.abs() + 16 * EPS
            assert bool(near.all())


@each_shape
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e25])
def test_gram(shape: tuple[int, int], size: float) -> None:
    left = shape[0] < shape[1]
    gradient = normal(*shape) * size
    found, sound = gram(gradient, left=left)
    small = gradient.double() / gradient.double().abs().max()
    expected = small @ small.t() if left else small.t() @ small
    assert bool(sound)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * 67 * EPS * 4)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gram_matrix_of_nothing_is_the_identity(bad: float) -> None:
    gradient = normal(4, 9) * 0.0 if bad == 0.0 else normal(4, 9)
    gradient[1, 2] = bad
    found, sound = gram(gradient, left=True)
    assert not bool(sound)
    assert torch.equal(found, torch.eye(4))
