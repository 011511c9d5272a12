"""Stochastic rounding to bf16: in the mean, at its edges, the same bits everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels import stochastic_rounding as module
from memrt.kernels.stochastic_rounding import (
    Rounding,
    random_bits_reference,
    rounding_key,
    stochastic_copy_,
    stochastic_round_reference,
    workspace_bytes,
)
from tests.kernels.aot import compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.live_bytes import LiveBytes

KEY = (123456789, 987654321)
N = 2**16
COPY = torch.ops.memrt.stochastic_copy.default


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bits_of(index: Tensor, key: tuple[int, int] = KEY, step: int = 1) -> Tensor:
    return random_bits_reference(index, torch.tensor(key), torch.tensor(step))


def rounding(step: int = 1) -> Rounding:
    return Rounding(KEY, torch.tensor(float(step)))


def mixed(x: int) -> int:
    """The hash's bijection in Python's integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x68BC21EB)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


# ---------------------------------------------------------------- the hash


@pytest.mark.parametrize("index", [0, 1, 2**31, 2**32 - 1, 2**32, 5 * 2**32 + 7])
def test_the_hash_is_its_formula(index: int) -> None:
    low, high = index % 2**32, index >> 32
    first = mixed(low ^ mixed(KEY[0] ^ 3))
    expected = mixed(((first + high) % 2**32) ^ KEY[1]) % 2**16
    assert bits_of(torch.tensor([index]), step=3).item() == expected


def test_bits_are_uniform_and_independent() -> None:
    """Against neighbours, the next step, another parameter: correlations are 1 / sqrt(N)."""
    index = torch.arange(N)
    bits = bits_of(index).double()
    assert bits.mean().item() == pytest.approx(2**15, abs=5 * 2**16 / 12**0.5 / N**0.5)
    counts = torch.bincount(bits_of(index) >> 10, minlength=64).double()
    expected = N / 64
    chi_squared = ((counts - expected).square() / expected).sum().item()
    assert chi_squared < 63 + 5 * (2 * 63) ** 0.5
    others = {
        "neighbour": bits.roll(1),
        "row": bits.roll(256),
        "step": bits_of(index, step=2).double(),
        "parameter": bits_of(index, rounding_key(0, 1)).double(),
        "lowest bit": (bits_of(index) & 1).double().roll(1),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([bits, other]))[0, 1].item()
        assert abs(correlation) < 5 / N**0.5, name


def test_keys_differ_between_parameters_and_seeds() -> None:
    keys = {rounding_key(seed, parameter) for seed in range(20) for parameter in range(200)}
    assert len(keys) == 4000
    assert all(0 <= word < 2**31 for key in keys for word in key)


# ---------------------------------------------------------------- rounding


def test_the_mean_is_the_value() -> None:
    """At every fraction of the way between two bf16 numbers, of either sign."""
    fraction = torch.arange(0, 1, 1 / 16)
    for start, width in ((1.0, 2**-7), (-(2.0**-20), -(2.0**-27)), (2.0**127, 2.0**120)):
        values = start + width * fraction
        target = torch.empty(16, N // 4).bfloat16()
        stochastic_copy_(
            target, values[:, None].expand(16, N // 4).contiguous(), rounding=rounding()
        )
        share = ((target.double() - start) / width).mean(dim=1)
        assert (share - fraction).abs().max() < 5 * 0.5 / (N // 4) ** 0.5
        assert set(((target.double() - start) / width).unique().tolist()) <= {0.0, 1.0}


def test_what_bf16_has_stays() -> None:
    values = torch.randn(N).bfloat16()
    target = torch.empty_like(values)
    stochastic_copy_(target, values.float(), rounding=rounding())
    assert torch.equal(target, values)


def test_special_numbers_are_rounded_to_the_nearest() -> None:
    largest = torch.finfo(torch.bfloat16).max
    words = torch.tensor([0x7F7F1234, 0x7F7FFFFF, -0x7FFFFFFF - 1], dtype=torch.int32)
    values = torch.cat(
        [
            torch.tensor([torch.nan, torch.inf, -torch.inf, largest, -largest, 0.0]),
            words.view(torch.float32),
        ]
    )
    for bits in (0, 0xFFFF):
        found = stochastic_round_reference(values, torch.full_like(values, bits).long())
        torch.testing.assert_close(found, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    below = torch.tensor([0x7F7E8000], dtype=torch.int32).view(torch.float32)
    assert stochastic_round_reference(below, torch.tensor([0xFFFF])).item() == largest


def test_pieces_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.randn(67, 31)
    whole = torch.empty(67, 31).bfloat16()
    stochastic_copy_(whole, source, rounding=rounding())
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 100)
    pieced = torch.empty(67 * 31).bfloat16()
    stochastic_copy_(pieced[:1000], source.view(-1)[:1000], rounding=rounding())
    stochastic_copy_(pieced[1000:], source.view(-1)[1000:], rounding=rounding(), first_index=1000)
    assert torch.equal(pieced.view(67, 31), whole)
    turned = torch.empty(31, 67).bfloat16().t()
    stochastic_copy_(turned, source.t().contiguous().t(), rounding=rounding())
    assert torch.equal(turned, whole)


def test_compiled_pieces_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the index's lower word wraps inside a piece, and where values are special."""
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 512)
    source = torch.randn(2100)
    source[::7] = torch.tensor([torch.nan, torch.inf, -3.39e38, 0.0, 2.0**-140]).repeat(60)
    eager, compiled = torch.empty(2, 2100).bfloat16()
    stochastic_copy_(eager, source, rounding=rounding(), first_index=2**32 - 700)
    monkeypatch.setattr(module, "COMPILED_FROM_ELEMENTS", 1)
    stochastic_copy_(compiled, source, rounding=rounding(), first_index=2**32 - 700)
    assert not module._compiled_piece.fell_back
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0, equal_nan=True)
    index = torch.arange(2**32 - 700, 2**32 + 1400)
    expected = stochastic_round_reference(source, bits_of(index))
    torch.testing.assert_close(eager, expected, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- the operator


def arguments(n: int) -> dict[str, Any]:
    return {
        "target": torch.zeros(n).bfloat16(),
        "source": torch.randn(n),
        "step": torch.tensor(3.0),
        "key0": KEY[0],
        "key1": KEY[1],
        "first_index": 2**32 - 10,
    }


@pytest.mark.parametrize("n", [0, 1, 67])
def test_opcheck(n: int) -> None:
    torch.library.opcheck(COPY, (), arguments(n))


@pytest.mark.parametrize("n", [5000, 10000])
def test_workspace_is_what_the_body_allocates(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 4096)
    call = arguments(n)
    with LiveBytes([call["target"], call["source"]]) as seen:
        module._stochastic_copy._init_fn(**call)
    declared = workspace_bytes(**call)
    assert seen.peak_bytes <= declared <= 1.5 * seen.peak_bytes


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"from fp32 to bf16, got torch\.float64"):
        stochastic_copy_(torch.zeros(3).bfloat16(), torch.zeros(3).double(), rounding=rounding())
    with pytest.raises(ValueError, match=r"target is \(3,\), the source \(4,\)"):
        stochastic_copy_(torch.zeros(3).bfloat16(), torch.zeros(4), rounding=rounding())


# ---------------------------------------------------------------- Triton


def test_the_interpreted_kernel_has_the_bits_of_the_reference() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.39e38, -3.39e38, 0.0, 2.0**-140])
    calls = [arguments(5000), arguments(1), {**arguments(7), "source": special}]
    found = call_interpreted("memrt.kernels.stochastic_rounding:_stochastic_copy", calls)
    for call, left in zip(calls, found, strict=True):
        module._stochastic_copy(**call)
        torch.testing.assert_close(left["target"], call["target"], rtol=0, atol=0, equal_nan=True)


def test_it_compiles_for_every_architecture_without_spills(
    record_property: Callable[[str, object], None],
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    found = compile_ahead(
        "memrt.kernels._triton.stochastic_rounding:stochastic_copy_kernel",
        {
            "target_ptr": "*bf16",
            "source_ptr": "*fp32",
            "step_ptr": "*fp32",
            **dict.fromkeys(("num_elements", "key0", "key1"), "i32"),
            "first_index": "i64",
        },
        {"BLOCK": 1024},
        num_warps=4,
        enable_fp_fusion=False,
    )
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.registers <= 64, resources


@pytest.mark.gpu
def test_a_gpu_has_the_bits_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    source = torch.randn(2**16 + 67)
    expected = torch.empty_like(source, dtype=torch.bfloat16)
    stochastic_copy_(expected, source, rounding=rounding(step=7), first_index=2**32 - 5)
    target = torch.empty_like(expected, device="cuda")
    stochastic_copy_(target, source.cuda(), rounding=rounding(step=7), first_index=2**32 - 5)
    assert torch.equal(target.cpu(), expected)
