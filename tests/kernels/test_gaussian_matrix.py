"""Matrices from a key: normal, independent, the same again in any pieces, and honest bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.kernels import gaussian_matrix as module
from memrt.kernels.counter_hash import key_words
from memrt.kernels.gaussian_matrix import (
    gaussian_matrix,
    gaussian_pairs_reference,
    workspace_bytes,
)
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.live_bytes import LiveBytes

CPU = torch.device("cpu")
# 4 warps of 96 registers a thread leave room for 5 programs on a multiprocessor
MAX_REGISTERS = 96


def make(rows: int, columns: int, *, std: float = 1.0, number: int = 0) -> torch.Tensor:
    return gaussian_matrix(rows, columns, key=key_words(42, number), std=std, device=CPU)


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
    monkeypatch.setattr(module, "PIECE_PAIRS", 7)
    before = torch.get_rng_state()
    assert torch.equal(make(*shape, std=0.25), whole)
    assert torch.equal(torch.get_rng_state(), before)
    count = whole.numel()
    cosines, sines = gaussian_pairs_reference(torch.arange(-(-count // 2)), key_words(42, 0))
    expected = torch.cat([cosines, sines])[:count] * 0.25
    torch.testing.assert_close(whole.flatten(), expected.float(), rtol=2**-23, atol=0)


def test_the_hash_is_that_of_the_docstring() -> None:
    """In Python's own integers: a resumed run, on any device, must make the same matrix again."""

    def mix(word: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x68BC21EB)):
            word = (word ^ (word >> shift)) * factor % 2**32
        return word ^ (word >> 16)

    key = key_words(42, 7, 1)
    assert all(0 <= word < 2**31 for word in key)
    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    expected = [mix(mix(number ^ key[0]) ^ key[1]) for number in numbers]
    assert module._hash(torch.tensor(numbers), key).tolist() == expected
    assert len({key_words(*numbers) for numbers in ((1, 23), (12, 3), (1, 2, 3))}) == 3
    with pytest.raises(ValueError, match="more than the hash"):
        make(2**17, 2**17)


def test_no_pair_of_a_large_matrix_is_met_twice() -> None:
    """The hash is a bijection of words below 2^32."""
    found = module._hash(torch.arange(2**18), key_words(1))
    assert found.unique().numel() == 2**18


def test_workspace_is_what_is_used() -> None:
    for shape in ((64, 33), (430, 600)):  # one piece, and two
        target = torch.empty(shape)
        with LiveBytes([target]) as live:
            module._fill._init_fn(target, 1, 2, 0.5)
        assert 0.8 * workspace_bytes(target) <= live.peak_bytes <= workspace_bytes(target)
    with FakeTensorMode():
        assert workspace_bytes(torch.empty(5000, 5000, device="cuda")) == 0


def test_a_fake_matrix_has_its_shape() -> None:
    with FakeTensorMode():
        found = make(300, 7)
    assert found.shape == (300, 7)
    assert found.dtype == torch.float32


def test_opcheck() -> None:
    arguments = {"target": torch.zeros(5, 3), "key0": 1, "key1": 2, "std": 0.5}
    torch.library.opcheck(torch.ops.memrt.fill_gaussian.default, (), arguments)


@pytest.mark.slow  # compiles for some ten seconds
def test_compiled_pieces_have_the_bits_of_eager_ones() -> None:
    found = make(600, 701, std=0.3)
    assert found.numel() >= module.COMPILED_FROM_ELEMENTS
    assert not module._compiled_piece.fell_back
    cosines, sines = gaussian_pairs_reference(torch.arange(210_300), key_words(42, 0))
    assert_same(found, torch.cat([cosines, sines]).mul_(0.3).float().view(600, 701))


# ---------------------------------------------------------------- Triton


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """All bits, but for what the docstring claims: one element in 10^8, one unit off."""
    assert int((found != expected).sum()) <= 1
    torch.testing.assert_close(found, expected, rtol=2**-23, atol=0)


def call_of(*shape: int, std: float, device: str = "cpu") -> dict[str, Any]:
    target = torch.full(shape, float("nan"), device=device)
    key0, key1 = key_words(42, 0)
    return {"target": target, "key0": key0, "key1": key1, "std": std}


def test_the_interpreted_kernel_has_the_numbers_of_the_reference() -> None:
    """Also for a standard deviation that fp32 does not have."""
    pytest.importorskip("triton", reason="Triton is not installed")
    calls = [call_of(*shape, std=1 / 3) for shape in ((0, 3), (1, 1), (1, 2), (67, 45), (301, 200))]
    found = call_interpreted("memrt.kernels.gaussian_matrix:_fill", calls)
    for left in found:
        assert_same(left["target"], make(*left["target"].shape, std=1 / 3))


def test_it_compiles_for_every_architecture_without_spills(
    record_property: Callable[[str, object], None],
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    found = compile_ahead(
        "memrt.kernels._triton.gaussian_matrix:fill_gaussian_kernel",
        {
            "target_ptr": "*fp32",
            "num_elements": "i64",
            **dict.fromkeys(("num_pairs", "key0", "key1"), "i32"),
            "std": "fp64",
        },
        {"BLOCK": 512},
        num_warps=4,
        enable_fp_fusion=False,
    )
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.registers <= MAX_REGISTERS, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture], resources


@pytest.mark.gpu
def test_a_gpu_has_the_numbers_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    call = call_of(1000, 701, std=1 / 3, device="cuda")
    module._fill(**call)
    assert_same(call["target"].cpu(), make(1000, 701, std=1 / 3))
