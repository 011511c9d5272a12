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

log2 and 2^y are polynomials in separate multiplications and additions, with errors of 4e-6, which
is little beside 2^-4: IEEE arithmetic then gives the same codes on every device, eagerly, compiled
and in Triton, which reads x' / a from `decoding_table`.

Source: Xi et al., COAT (arXiv 2410.19313), with (a, k) instead of three fp32 values a group.
"""

from __future__ import annotations

from functools import cache

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
    "ROUNDER",
    "SMALLEST",
    "TOLERANCE",
    "decoding_table",
    "dequantize_expanded_reference",
    "num_groups",
    "quantize_expanded_reference",
]

SMALLEST, LARGEST = 2.0**-126, 2.0**127
# log2(1 + t) / t for 1 + t in [1/sqrt(2), sqrt(2)] and (2^y - 1) / y for y in [-1/2, 1/2]: minimax
# in absolute error, from the constant upwards
LOG2 = (
    1.4427134990692139,
    -0.7211318612098694,
    0.4793480038642883,
    -0.3674899935722351,
    0.3221549093723297,
    -0.2065918445587158,
)
EXP2 = (0.6931215524673462, 0.24022020399570465, 0.05591968819499016, 0.00968190934509039)
SQRT_HALF_BITS = 0x3F3504F3
# log2(448) = 9 + this, as the polynomial above has it: the largest value of a group is kept exactly
LOG2_448 = -0.1926434338092804
LOG2_RANGE = 16.807354922057604  # log2(448 / 2^-8)
# of 16 * k, before it is rounded down: above its error in fp32, and too little to lose a code
TOLERANCE = 2.0**-7
# added to a number below 2^22 in magnitude, it leaves the nearest whole number in the lowest bits
ROUNDER = 1.5 * 2.0**23


@cache
def decoding_table(device: torch.device) -> Tensor:
    """x' / a by 16 * k and code, [256, 256]; 256 KiB, made once a device."""
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    powers = torch.arange(256, dtype=torch.uint8)
    # a large a, so that no small share falls below the smallest number
    table = dequantize_expanded_reference(
        codes, torch.full((256,), LARGEST, dtype=torch.float32), powers, positive=False
    )
    return (table / LARGEST).to(device)


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
    # of two tensors, for PyTorch divides a number by a tensor with two roundings
    power = torch.full_like(octaves, 16 * LOG2_RANGE) / octaves
    power = (power + TOLERANCE).floor().clamp(1.0, 255.0)  # 16 k

    below = _octaves(*_log2(torch.where(is_zero, largest_known, magnitude)), exponent, fraction)
    factor, n = _exp2_parts(below * (power * 0.0625))
    expanded = ((factor * 448.0).view(torch.int32) + (n << 23)).view(torch.float32)
    codes = _to_e4m3(expanded)
    codes = torch.where(is_zero, 0, torch.where(x < 0, codes | 128, codes))
    return codes.to(torch.uint8), largest.squeeze(1), power.to(torch.uint8).squeeze(1)


def dequantize_expanded_reference(
    codes: Tensor, largest: Tensor, power: Tensor, *, positive: bool
) -> Tensor:
    """x' [groups, 128] of what `quantize_expanded_reference` returned; of zeros, zeros."""
    integer = codes.to(torch.int32)
    magnitude_code = integer & 127
    exponent, fraction = _log2(_from_e4m3(magnitude_code.clamp(min=1)))
    octaves = (exponent - 9).float() + (fraction - LOG2_448)
    root = 16.0 / power.to(torch.float32).clamp(min=1.0).unsqueeze(1)  # 1 / k; 16 scales exactly
    factor, n = _exp2_parts(octaves * root)
    share = factor * ((n.clamp(min=-126) + 127) << 23).view(torch.float32)
    x = largest.unsqueeze(1) * share
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
    rounded = y + ROUNDER
    f = y - (rounded - ROUNDER)
    total = f * EXP2[-1] + EXP2[-2]
    for coefficient in EXP2[-3::-1]:
        total = total * f + coefficient
    return total * f + 1.0, rounded.view(torch.int32) - 0x4B400000


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
