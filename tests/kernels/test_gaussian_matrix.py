"""Matrices from a key: normal, independent, the same again in any pieces, and honest bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.kernels import gaussian_matrix as module
from memrt.kernels.gaussian_matrix import (
    gaussian_matrix,
    gaussian_pairs_reference,
    matrix_key,
    workspace_bytes,
)
from tests.kernels.live_bytes import LiveBytes

CPU = torch.device("cpu")


def make(rows: int, columns: int, *, std: float = 1.0, number: int = 0) -> torch.Tensor:
    return gaussian_matrix(rows, columns, key=matrix_key(42, number), std=std, device=CPU)


def test_the_numbers_are_normal() -> None:
    """Moments, and the distance to the normal distribution, within 5 standard errors."""
    found = make(500, 400).double().flatten()
    count = found.numel()
    assert abs(float(found.mean())) < 5 / math.sqrt(count)
    assert abs(float(found.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((found**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    expected = torch.special.ndtr(found.sort().values)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert float((expected - steps).abs().max()) < 2.2 / math.sqrt(count)  # Kolmogorov, 1e-4


def test_neighbours_rows_halves_and_keys_are_independent() -> None:
    one, other = make(500, 400).double(), make(500, 400, number=1).double()
    pairs = {
        "keys": (one, other),
        "neighbours": (one[:, 1:], one[:, :-1]),
        "rows": (one[1:], one[:-1]),
        "of one pair": (one[:250], one[250:]),
        "squares of one pair": (one[:250] ** 2 - 1, one[250:] ** 2 - 1),
    }
    for name, (x, y) in pairs.items():
        spread = float(x.std() * y.std()) / math.sqrt(x.numel())
        assert abs(float((x * y).mean())) < 5 * spread, name


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (67, 4), (1000, 1)])
def test_pieces_make_the_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(*shape, std=0.25)
    assert whole.shape == shape
    assert bool(torch.isfinite(whole).all())
    monkeypatch.setitem(module.PIECE_PAIRS, "cpu", 7)
    before = torch.get_rng_state()
    assert torch.equal(make(*shape, std=0.25), whole)
    assert torch.equal(torch.get_rng_state(), before)
    count = whole.numel()
    cosines, sines = gaussian_pairs_reference(torch.arange(-(-count // 2)), matrix_key(42, 0))
    expected = torch.cat([cosines, sines])[:count] * 0.25
    torch.testing.assert_close(whole.flatten(), expected.float(), rtol=2**-23, atol=0)


def test_the_hash_is_that_of_the_docstring() -> None:
    """In Python's own integers: a resumed run, on any device, must make the same matrix again."""

    def mix(word: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x68BC21EB)):
            word = (word ^ (word >> shift)) * factor % 2**32
        return word ^ (word >> 16)

    key = matrix_key(42, 7, 1)
    assert all(0 <= word < 2**31 for word in key)
    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    expected = [mix(mix(number ^ key[0]) ^ key[1]) for number in numbers]
    assert module._hash(torch.tensor(numbers), key).tolist() == expected
    assert len({matrix_key(*numbers) for numbers in ((1, 23), (12, 3), (1, 2, 3))}) == 3
    with pytest.raises(ValueError, match="more than the hash"):
        make(2**17, 2**17)


def test_no_pair_of_a_large_matrix_is_met_twice() -> None:
    """The hash is a bijection of words below 2^32."""
    found = module._hash(torch.arange(2**18), matrix_key(1))
    assert found.unique().numel() == 2**18


def test_workspace_is_what_is_used() -> None:
    for shape in ((64, 33), (500, 900)):
        target = torch.empty(shape)
        with LiveBytes() as live:
            pairs = torch.arange(min(-(-target.numel() // 2), module.PIECE_PAIRS["cpu"]))
            first, second = gaussian_pairs_reference(pairs, (1, 2))
            first.mul_(0.5)
            second.mul_(0.5)
        assert 0.8 * workspace_bytes(target) <= live.peak_bytes <= workspace_bytes(target)


def test_a_fake_matrix_has_its_shape() -> None:
    with FakeTensorMode():
        found = make(300, 7)
    assert found.shape == (300, 7)
    assert found.dtype == torch.float32
