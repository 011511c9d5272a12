"""`memrt.kernels.expanded_fp8` in Triton: the same operations in the same order.

E4M3 is coded in integers, so that GPUs
without the type (sm_80) run it too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memrt.kernels import expanded_fp8 as form

SMALLEST = tl.constexpr(form.SMALLEST)
LARGEST = tl.constexpr(form.LARGEST)
SQRT_HALF_BITS = tl.constexpr(form.SQRT_HALF_BITS)
LOG2_RANGE_16 = tl.constexpr(16 * form.LOG2_RANGE)
ROUNDER = tl.constexpr(form.ROUNDER)
TOLERANCE = tl.constexpr(form.TOLERANCE)
L0, L1, L2, L3, L4, L5 = (tl.constexpr(c) for c in form.LOG2)
E0, E1, E2, E3 = (tl.constexpr(c) for c in form.EXP2)


@triton.jit
def log2_parts(x):
    """e (int32) and f with log2(x) = e + f and |f| <= 1/2, for x that is a normal number."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    total = t * L5 + L4
    total = total * t + L3
    total = total * t + L2
    total = total * t + L1
    total = total * t + L0
    return exponent, total * t


@triton.jit
def exp2_parts(y):
    """p, and n (int32) in the lowest bits, with 2^y = p * 2^n, p in [1/sqrt(2), sqrt(2)]."""
    rounded = y + ROUNDER
    f = y - (rounded - ROUNDER)
    total = f * E3 + E2
    total = total * f + E1
    total = total * f + E0
    return total * f + 1.0, rounded.to(tl.int32, bitcast=True)


@triton.jit
def to_e4m3(x):
    """The bits (int32) of x in [0, 448] rounded to E4M3, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = (x * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def dequantize(codes, largest, power, table_ptr, mask, POSITIVE: tl.constexpr):
    """x [groups, 128] of codes (int32), and largest (fp32) and power (int32) [groups, 1]."""
    x = tl.load(table_ptr + power * 256 + codes, mask=mask, other=0.0) * largest
    if POSITIVE:
        return tl.where((x < SMALLEST) & (codes != 0), SMALLEST, x)
    return tl.where(tl.abs(x) < SMALLEST, 0.0, x)


@triton.jit
def quantize(x, POSITIVE: tl.constexpr):
    """Codes (int32) of x [groups, 128]; largest (fp32) and power (int32) [groups, 1]."""
    magnitude = tl.abs(x)
    small = tl.where(magnitude > 0.0, SMALLEST if POSITIVE else 0.0, 0.0)
    magnitude = tl.minimum(tl.where(magnitude < SMALLEST, small, magnitude), LARGEST)
    is_zero = magnitude == 0.0
    largest = tl.max(magnitude, axis=1, keep_dims=True)
    smallest = tl.min(tl.where(is_zero, LARGEST, magnitude), axis=1, keep_dims=True)
    largest_known = tl.where(largest > 0.0, largest, LARGEST)
    exponent, fraction = log2_parts(largest_known)
    low_exponent, low_fraction = log2_parts(smallest)
    octaves = (low_exponent - exponent).to(tl.float32) + (low_fraction - fraction)
    octaves = tl.maximum(-octaves, 0.015625)
    power = tl.floor(tl.div_rn(octaves * 0.0 + LOG2_RANGE_16, octaves) + TOLERANCE)
    power = tl.minimum(tl.maximum(power, 1.0), 255.0)

    own_exponent, own_fraction = log2_parts(tl.where(is_zero, largest_known, magnitude))
    below = (own_exponent - exponent).to(tl.float32) + (own_fraction - fraction)
    factor, n = exp2_parts(below * (power * 0.0625))
    scaled = (factor * 448.0).to(tl.int32, bitcast=True) + (n << 23)
    expanded = scaled.to(tl.float32, bitcast=True)
    codes = tl.where(is_zero, 0, to_e4m3(expanded))
    codes = codes | tl.where((x < 0.0) & (magnitude > 0.0), 128, 0)
    return codes, largest, power.to(tl.int32)
