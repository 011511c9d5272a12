"""Whether tensors are finite, as torch.isfinite says of every element."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.kernels.finite import all_finite

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 700, 1000])
def test_one_bad_element_anywhere_is_found(dtype: torch.dtype, bad: float, place: int) -> None:
    good = torch.randn(67, 3).to(dtype)
    broken = torch.randn(1001).to(dtype)
    assert all_finite([good, broken])
    broken[place] = bad
    assert not all_finite([good, broken])
    assert not all_finite([broken, good])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_numbers_are_finite(dtype: torch.dtype) -> None:
    """A sum of them, or of their squares, is not."""
    limits = torch.finfo(dtype)
    assert all_finite([torch.full((1000,), limits.max, dtype=dtype)])
    assert all_finite([torch.tensor([limits.max, limits.min], dtype=dtype)])


def test_shapes() -> None:
    """Nothing at all, empty, 0-dim, not contiguous."""
    assert all_finite([])
    assert all_finite([torch.empty(0)])
    assert all_finite([torch.tensor(1.0), torch.empty(0, 3)])
    assert not all_finite([torch.tensor(float("nan"))])
    strided = torch.zeros(4, 6)
    strided[1, 2] = float("inf")
    assert all_finite([strided.t()[:2]])
    assert not all_finite([strided.t()[2:]])


def test_fake_tensors_are_taken_for_finite() -> None:
    with FakeTensorMode():
        assert all_finite([torch.empty(3)])
