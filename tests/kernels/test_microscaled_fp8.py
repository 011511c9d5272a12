"""E4M3 with a power of two for every 32: against the definition, and the same codes in Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels.microscaled_fp8 import FLOAT8, GROUP_SIZE, microscale, num_groups, restore
from tests.kernels.interpreter import call_interpreted

WIDTHS = (1, 31, 32, 33, 64, 100)


def rows_of(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose sizes span 16 octaves, with a zero, a group of zeros and an outlier."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(tokens, width, generator=generator)
    x *= 2.0 ** torch.randint(-12, 5, (tokens, width), generator=generator)
    x[0, :GROUP_SIZE] = 0
    x[-1, -1] = 3000.0
    return x.to(dtype)


def defined(group: Tensor) -> tuple[Tensor, int]:
    """Codes and k of one group by the formula, in fp64: each element's nearest value of E4M3."""
    values = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()
    largest, k = float(group.abs().max()), -126
    while largest > 448 * 2.0**k:
        k += 1
    distance = (values - group.double()[:, None] * 2.0**-k).abs().nan_to_num(nan=float("inf"))
    nearest = distance.min(dim=1, keepdim=True).values
    even = torch.arange(256) % 2 == 0
    tied = (distance == nearest).float() * (1 + even)  # ties go to the even code
    return values[tied.argmax(dim=1)], k


@pytest.mark.parametrize("width", WIDTHS)
def test_codes_and_exponents_are_those_of_the_definition(width: int) -> None:
    x = rows_of(5, width)
    codes, exponents = microscale(x)
    assert codes.dtype is FLOAT8
    assert exponents.shape == (5, num_groups(width))
    for row in range(5):
        for group, piece in enumerate(torch.split(x[row], GROUP_SIZE)):
            expected, k = defined(piece)
            here = slice(group * GROUP_SIZE, group * GROUP_SIZE + len(piece))
            assert int(exponents[row, group]) - 127 == k
            assert torch.equal(codes[row, here].double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_comes_back_is_within_a_sixteenth_of_each_element(
    width: int, dtype: torch.dtype
) -> None:
    x = rows_of(7, width, dtype)
    back = restore(*microscale(x), dtype)
    assert back.dtype is dtype
    pieces = (torch.split(rows, GROUP_SIZE, dim=1) for rows in (x, back))
    for left, right in zip(*pieces, strict=True):
        floor = left.double().abs().amax(dim=1, keepdim=True) * 2.0**-18
        assert bool(((left - right).double().abs() <= left.double().abs() / 16 + floor).all())
    assert torch.equal(restore(*microscale(back), dtype), back)  # what was kept is kept again


def test_a_large_channel_costs_its_own_group_only() -> None:
    x = rows_of(4, 96)
    louder = x.clone()
    louder[:, 40] = 1e6
    before, after = (restore(*microscale(each), torch.float32) for each in (x, louder))
    assert torch.equal(before[:, :32], after[:, :32])
    assert torch.equal(before[:, 64:], after[:, 64:])


def test_ends_of_the_range_and_what_is_no_number() -> None:
    tiny, huge = torch.finfo(torch.float32).tiny, 2.0**127
    x = torch.tensor([[tiny / 4] * 32, [huge] * 32, [1.0] * 32, [-1.0] * 32, [1.0] * 32])
    x[2, 3], x[3, 3], x[4, 3] = float("inf"), float("nan"), -float("nan")
    back = restore(*microscale(x), torch.float32)
    assert torch.equal(back[0], x[0])
    assert torch.equal(back[1], x[1])
    assert not back[2:].isfinite().any()
    half = torch.full((1, 32), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert torch.equal(restore(*microscale(half), torch.float16), half)


def test_rows_of_any_layout_and_none() -> None:
    x = rows_of(96, 64)
    expected = microscale(x.t().contiguous())
    for a, b in zip(microscale(x.t()), expected, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    codes, exponents = microscale(x[:0])
    assert restore(codes, exponents, torch.bfloat16).shape == (0, 64)


def test_triton_writes_the_same_codes_while_it_multiplies() -> None:
    """By one program of several for the same tokens, with a state and without."""
    pytest.importorskip("triton", reason="Triton is not installed")
    calls: list[dict[str, Any]] = []
    for tokens, width, side, dtype in (
        (3, 40, 10, torch.float32),
        (67, 100, 72, torch.float16),
        (66, 96, 16, torch.float32),
    ):
        hidden = rows_of(tokens, width, dtype)
        hidden[1, 3] = float("inf")
        state = torch.randn(tokens, side).to(dtype) if side != 16 else None
        calls.append(
            {
                "hidden": hidden,
                "weight": torch.randn(side, width).to(dtype) / width,
                "bias": None,
                "state": state,
                "gate": None if state is None else torch.rand(1),
                "mixed": torch.full((tokens, side), float("nan"), dtype=dtype),
                "difference": None if state is None else torch.empty_like(state),
                "kept": (
                    torch.full((tokens, width), 0xAA, dtype=torch.uint8).view(FLOAT8),
                    torch.full((tokens, num_groups(width)), 0xAA, dtype=torch.uint8),
                ),
            }
        )
    left = call_interpreted("memrt.kernels._triton.ladder:launch", calls)
    for call, found in zip(calls, left, strict=True):
        codes, exponents = microscale(call["hidden"])
        assert torch.equal(found["kept"][1], exponents)
        for kept in (codes, found["kept"][0]):
            broken = kept[1:2, :GROUP_SIZE].view(torch.uint8)
            assert bool((broken & 0x7F == 0x7F).all())
            broken.fill_(0)  # a NaN's sign is anybody's
        assert torch.equal(found["kept"][0].view(torch.uint8), codes.view(torch.uint8))
        assert not found["mixed"][0].isnan().any()


def test_torchao_s_codes_are_the_same() -> None:
    """Its "rceil" takes k as here; a group of zeros has 2^-127 there, 2^-126 here."""
    name = "torchao.prototype.mx_formats.mx_tensor"
    peer = pytest.importorskip(name, reason="torchao is not installed")
    x = rows_of(400, 96)
    exponents, codes = peer.to_mx(x, FLOAT8, GROUP_SIZE, peer.ScaleCalculationMode.RCEIL)
    ours = microscale(x)
    assert torch.equal(codes.view(torch.uint8).view(x.shape), ours[0].view(torch.uint8))
    assert torch.equal(exponents.view(torch.uint8).view(400, 3).clamp(min=1), ours[1])
