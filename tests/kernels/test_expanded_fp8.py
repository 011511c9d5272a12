"""FP8 with dynamic range expansion: against its formula in fp64, at its edges, and over decays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memrt.kernels import expanded_fp8 as module
from memrt.kernels.expanded_fp8 import (
    LARGEST,
    SMALLEST,
    dequantize_expanded_reference,
    num_groups,
    quantize_expanded_reference,
)

LOG_ERROR = POWER_ERROR = 4e-6  # as the module's docstring says
CODES = torch.arange(1, 127, dtype=torch.uint8)  # the finite values of E4M3 above zero


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def groups_of(spread: float, *, num: int = 256, positive: bool) -> Tensor:
    """Groups whose magnitudes lie over about 6 * spread natural logarithms; of every scale."""
    x = torch.randn(num, 128).sign() * torch.exp(spread * torch.randn(num, 128))
    x = x * torch.exp(4 * torch.randn(num, 1))
    return x.abs() if positive else x


def round_trip(x: Tensor, *, positive: bool) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    kept = quantize_expanded_reference(x, positive=positive)
    return dequantize_expanded_reference(*kept, positive=positive), kept


def formula(x: Tensor, power: Tensor) -> Tensor:
    """Codes and back by the docstring's formula, in fp64, with PyTorch's own E4M3."""
    largest = x.abs().amax(dim=1, keepdim=True).double()
    k = power.double()[:, None] / 16
    expanded = 448 * (x.abs().double() / largest) ** k
    rounded = expanded.float().to(torch.float8_e4m3fn).double()
    return x.sign() * largest * (rounded / 448) ** (1 / k)


# ---------------------------------------------------------------- arithmetic


def test_logarithm_and_power_have_the_stated_errors() -> None:
    x = torch.exp(torch.empty(2**16).uniform_(math.log(SMALLEST), math.log(LARGEST)))
    whole, part = module._log2(x)
    assert (whole.double() + part.double() - x.double().log2()).abs().max() < LOG_ERROR
    y = torch.empty(2**16).uniform_(-300, 0)
    factor, n = module._exp2_parts(y)
    assert (factor.double() / torch.exp2(y.double() - n) - 1).abs().max() < POWER_ERROR
    assert [part.item() for part in module._exp2_parts(torch.zeros(1))] == [1.0, 0]
    whole, part = module._log2(torch.tensor([448.0]))
    assert whole.item() == 9
    assert part.item() == torch.tensor(module.LOG2_448).item()


def test_e4m3_in_integers_is_that_of_torch() -> None:
    values = CODES.view(torch.float8_e4m3fn).float()
    assert torch.equal(module._from_e4m3(CODES.int()), values)
    ties = (values[1:] + values[:-1]) / 2
    anywhere = torch.exp2(torch.empty(2**16).uniform_(-14, math.log2(448)))
    x = torch.cat([values, ties, anywhere, torch.zeros(1)])
    assert torch.equal(module._to_e4m3(x), x.to(torch.float8_e4m3fn).view(torch.uint8).int())


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("spread", [0.05, 0.5, 1.0, 2.0])
def test_values_are_those_of_the_formula(spread: float, positive: bool) -> None:
    x = groups_of(spread, positive=positive)
    found, (_, largest, power) = round_trip(x, positive=positive)
    assert torch.equal(largest, x.abs().amax(dim=1))
    expected = formula(x, power)
    # next to a tie, fp32 error tips a code: rarely, and by one step of E4M3
    same = (found.double() - expected).abs() <= 1e-5 * expected.abs()
    assert same.float().mean() > 0.999


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("spread", [0.05, 0.5, 1.0, 2.0])
def test_the_power_is_the_largest_that_loses_nothing(spread: float, positive: bool) -> None:
    x = groups_of(spread, positive=positive)
    found, (_, _, power) = round_trip(x, positive=positive)
    magnitude = x.abs().double()
    ratio = (magnitude.amax(dim=1) / magnitude.amin(dim=1)).log2()
    exact = 16 * math.log2(448 * 2**8) / ratio
    assert (power >= (exact - 2**-7).floor().clamp(1, 255)).all()
    assert (power <= (exact + 2**-7).floor().clamp(1, 255)).all()
    assert (found != 0).all()
    assert torch.equal(found.sign(), x.sign())


@pytest.mark.parametrize(("spread", "largest_error"), [(0.05, 2**-7), (0.5, 2**-5), (1.0, 2**-4)])
def test_expansion_keeps_relative_errors_small(spread: float, largest_error: float) -> None:
    """Plain E4M3 has 2^-4 everywhere; k > 1 divides it."""
    x = groups_of(spread, positive=False)
    found, _ = round_trip(x, positive=False)
    error = ((found - x) / x).square().mean().sqrt()
    assert error < largest_error / 2


def test_the_largest_of_a_group_is_kept_exactly() -> None:
    x = groups_of(1.0, positive=False)
    found, _ = round_trip(x, positive=False)
    assert torch.equal(found.abs().amax(dim=1), x.abs().amax(dim=1))


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("value", [1.0, -1e-3, 1.23e-11, 3e20, SMALLEST, -LARGEST])
def test_constant_groups_come_back_exactly(value: float) -> None:
    """The published kernel divides by log2(1) = 0 here, and loses signs."""
    x = torch.full((2, 128), value)
    x[1, ::2] *= -1
    assert torch.equal(round_trip(x, positive=False)[0], x)


def test_zeros_stay_zero_and_do_not_count_in_the_range() -> None:
    """A zero in the first place made the published range collapse."""
    x = groups_of(0.5, positive=True)
    with_zeros = x.clone()
    with_zeros[:, ::3] = 0
    found, (codes, _, _) = round_trip(with_zeros, positive=True)
    assert (codes[:, ::3] == 0).all()
    assert (found[:, ::3] == 0).all()
    assert ((found - with_zeros).abs() <= 0.1 * with_zeros).all()
    found, (codes, largest, _) = round_trip(torch.zeros(3, 128), positive=True)
    assert not codes.any()
    assert not largest.any()
    assert not found.any()


def test_a_new_state_of_zeros_decodes_to_zeros() -> None:
    codes = torch.zeros(2, 128, dtype=torch.uint8)
    power = torch.zeros(2, dtype=torch.uint8)
    for positive in (False, True):
        found = dequantize_expanded_reference(codes, torch.zeros(2), power, positive=positive)
        assert torch.equal(found, torch.zeros(2, 128))


def test_one_large_value_does_not_wipe_out_the_others() -> None:
    """k < 1 compresses: 60 octaves fit, where E4M3 alone ends after 18."""
    x = torch.full((1, 128), 2.0**-40)
    x[0, 7] = 2.0**20
    x[0, 9] = -(2.0**-10)
    found, (_, _, power) = round_trip(x, positive=False)
    assert power.item() < 16
    assert ((found - x).abs() <= 0.4 * x.abs()).all()


@pytest.mark.parametrize("positive", [False, True])
def test_the_smallest_and_the_largest_numbers(positive: bool) -> None:
    x = torch.zeros(1, 128)
    x[0, :4] = torch.tensor([2.0**-149, 2.0**-126, 1.0, 3e38])
    found, _ = round_trip(x, positive=positive)
    assert found.isfinite().all()
    assert found[0, 3] == LARGEST
    assert (found[0, 0] >= SMALLEST) == positive  # a second moment above zero stays above zero
    assert (found[0, 1:4] > 0).all()
    assert not found[0, 4:].any()


def test_num_groups() -> None:
    assert [num_groups(n) for n in (0, 1, 128, 129)] == [0, 1, 1, 2]


# ---------------------------------------------------------------- over steps


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("spread", [0.05, 0.2, 0.5, 1.0, 3.0])
def test_what_only_decays_keeps_its_codes(spread: float, positive: bool) -> None:
    """From the second time on nothing is rounded again: only the largest value falls."""
    found, kept = round_trip(groups_of(spread, positive=positive), positive=positive)
    for _ in range(3):
        found, kept = round_trip(found * 0.999, positive=positive)
    settled = kept
    for _ in range(50):
        found, kept = round_trip(found * 0.999, positive=positive)
    assert torch.equal(kept[0], settled[0])
    assert torch.equal(kept[2], settled[2])
    torch.testing.assert_close(kept[1], settled[1] * 0.999**50, rtol=50 * 2**-23, atol=0)


def test_the_table_has_what_the_reference_decodes() -> None:
    """For groups of any scale, to the bit: the Triton kernel multiplies with it."""
    for positive in (False, True):
        for spread in (0.1, 1.0, 5.0):
            found, (codes, largest, power) = round_trip(
                groups_of(spread, positive=positive), positive=positive
            )
            table = module.decoding_table(torch.device("cpu"))
            assert table.shape == (256, 256)
            assert torch.equal(table[power[:, None].int(), codes.int()] * largest[:, None], found)
