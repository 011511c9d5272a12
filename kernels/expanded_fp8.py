"""FP8 with dynamic range expansion: 8-bit floats whose exponent is stretched to each group's range.

A group is 128 consecutive values x, with a = max |x|. E4M3 spans 17.8 octaves, the moments of an
optimizer a few within a group, so each group is raised to a power k before it is rounded:

    code = e4m3(448 * (|x| / a)^k) with the sign of x,     x' = sign * a * (e4m3 value / 448)^(1/k)

k = floor(16 * log2(448 / 2^-8) / log2(a / min |x| over x != 0)) / 16, within [1/16, 255/16]: the
smallest value that is not zero comes to lie at 2^-8, two steps above zero, so none is lost. A
relative error of at most 2^-4 in the expanded domain is one of about 2^-4 / k in x.

Kept of a group are its codes, a (fp32) and 16 * k (uint8): 1 + 5 / 128 bytes an element. That 2^-8
is a value of E4M3 matters: what was kept is kept again with the same k and codes, so a state that
only decays does not drift (with a bound between two values, k falls again at every step).

Groups of zeros have codes 0. x is within [2^-126, 2^127] or 0: larger magnitudes are cut, and
smaller ones are 0, or with `positive` (second moments) 2^-126, so that no second moment above zero
is ever kept as zero. NaN is not for this module.

log2 and 2^y are polynomials in separate multiplications and additions, with errors of 4e-7 and
2e-7: IEEE arithmetic then gives the same codes on every device, eagerly, compiled and in Triton.

Source: Xi et al., COAT (arXiv 2410.19313), with (a, k) instead of three fp32 values a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memrt.kernels.adamw_step import GROUP_SIZE, num_groups

__all__ = [
    "EXP2",
    "GROUP_SIZE",
    "LARGEST",
    "LOG2",
    "LOG2_448",
    "LOG2_RANGE",
    "SMALLEST",
    "TOLERANCE",
    "dequantize_expanded_reference",
    "num_groups",
    "quantize_expanded_reference",
]

SMALLEST, LARGEST = 2.0**-126, 2.0**127
# log2(1 + t) / t for 1 + t in [1/sqrt(2), sqrt(2)] and (2^y - 1) / y for y in [-1/2, 1/2]: minimax
# in absolute error, from the constant upwards
LOG2 = (
    1.4426996707916260,
    -0.7213758826255798,
    0.4804650247097015,
    -0.3589618504047394,
    0.2972626090049744,
    -0.2726980149745941,
    0.1706345230340958,
)
EXP2 = (
    0.6931472420692444,
    0.2402223497629166,
    0.0555030852556229,
    0.0096718752756715,
    0.0013407259248197,
)
SQRT_HALF_BITS = 0x3F3504F3
# log2(448) = 9 + this, as the polynomial above has it: the largest value of a group is kept exactly
LOG2_448 = -0.19264519214630127
LOG2_RANGE = 16.807354922057604  # log2(448 / 2^-8)
# of 16 * k, before it is rounded down: above its error in fp32, and too little to lose a code
TOLERANCE = 2.0**-8


def quantize_expanded_reference(x: Tensor, *, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [groups, 128] (uint8), a [groups] and 16 * k [groups] (uint8) of x [groups, 128]."""
    magnitude = x.abs()
    small = torch.where(magnitude > 0, SMALLEST, 0.0) if positive else torch.zeros_like(x)
    magnitude = torch.where(magnitude < SMALLEST, small, magnitude).clamp(max=LARGEST)
    is_zero = magnitude == 0
    largest = magnitude.amax(dim=1, keepdim=True)
    smallest = torch.where(is_zero, LARGEST, magnitude).amin(dim=1, keepdim=True)
    # a group of zeros gets any range
    largest_known = torch.where(largest > 0, largest, LARGEST)
    exponent, fraction = _log2(largest_known)
    octaves = _octaves(*_log2(smallest), exponent, fraction).neg().clamp(min=2.0**-6)
    power = (16 * LOG2_RANGE / octaves + TOLERANCE).floor().clamp(1.0, 255.0)  # 16 k

    below = _octaves(*_log2(torch.where(is_zero, largest_known, magnitude)), exponent, fraction)
    expanded = (_exp2(below * (power * 0.0625)) * 448.0).clamp(max=448.0)
    codes = torch.where(is_zero, 0, _to_e4m3(expanded))
    codes = codes | torch.where((x < 0) & ~is_zero, 128, 0)
    return codes.to(torch.uint8), largest.squeeze(1), power.to(torch.uint8).squeeze(1)


def dequantize_expanded_reference(
    codes: Tensor, largest: Tensor, power: Tensor, *, positive: bool
) -> Tensor:
    """x' [groups, 128] of what `quantize_expanded_reference` returned; of zeros, zeros."""
    integer = codes.to(torch.int32)
    magnitude_code = integer & 127
    exponent, fraction = _log2(_from_e4m3(magnitude_code.clamp(min=1)))
    octaves = (exponent - 9).float() + (fraction - LOG2_448)
    root = 16.0 / power.to(torch.float32).clamp(min=1.0).unsqueeze(1)  # 1 / k
    x = _scaled_exp2(largest.unsqueeze(1), octaves * root)
    x = torch.where(x < SMALLEST, SMALLEST if positive else 0.0, x)
    x = torch.where((magnitude_code == 0) | (largest.unsqueeze(1) == 0), 0.0, x)
    return torch.where(integer > 127, -x, x)


# ---------------------------------------------------------------- the same arithmetic everywhere


def _log2(x: Tensor) -> tuple[Tensor, Tensor]:
    """e (int32) and f with log2(x) = e + f and |f| <= 1/2, for x that is a normal number."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1.0
    total = t * LOG2[-1] + LOG2[-2]
    for coefficient in LOG2[-3::-1]:
        total = total * t + coefficient
    return exponent, total * t


def _octaves(exponent: Tensor, fraction: Tensor, from_exponent: Tensor, start: Tensor) -> Tensor:
    """Difference of two logarithms, the whole part without rounding."""
    return (exponent - from_exponent).float() + (fraction - start)


def _exp2_parts(y: Tensor) -> tuple[Tensor, Tensor]:
    """p and n (int32) with 2^y = p * 2^n, p in [1/sqrt(2), sqrt(2)]; y = 0 gives 1 and 0."""
    whole = (y + 0.5).floor()
    f = y - whole
    total = f * EXP2[-1] + EXP2[-2]
    for coefficient in EXP2[-3::-1]:
        total = total * f + coefficient
    return total * f + 1.0, whole.to(torch.int32)


def _power_of_two(n: Tensor) -> Tensor:
    """2^n for n (int32) in [-126, 127]."""
    return ((n + 127) << 23).view(torch.float32)


def _exp2(y: Tensor) -> Tensor:
    """2^y for y in [-126, 127]."""
    factor, n = _exp2_parts(y)
    return factor * _power_of_two(n)


def _scaled_exp2(scale: Tensor, y: Tensor) -> Tensor:
    """scale * 2^y for y <= 0, in two steps where 2^y alone is below fp32; y < -252 counts as it."""
    factor, n = _exp2_parts(y)
    first = n.clamp(min=-126)
    second = (n - first).clamp(min=-126)
    return scale * factor * _power_of_two(first) * _power_of_two(second)


def _to_e4m3(x: Tensor) -> Tensor:
    """The bits (int32) of x in [0, 448] rounded to E4M3, ties to even."""
    bits = x.view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # adding 2^23 rounds to whole steps of 2^-9, and leaves them in the lowest bits
    subnormal = (x * 512.0 + 8388608.0).view(torch.int32) - 0x4B000000
    return torch.where(x < 2.0**-6, subnormal, normal)


def _from_e4m3(code: Tensor) -> Tensor:
    """The value of E4M3 bits (int32) in [1, 126]."""
    normal = ((code << 20) + (120 << 23)).view(torch.float32)
    return torch.where(code < 8, code.float() * 2.0**-9, normal)
