"""`memrt.kernels.microscaled_fp8` in Triton: the same codes.

In integers, so that GPUs without E4M3 (sm_80) run it too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memrt.kernels import microscaled_fp8 as form
from memrt.kernels._triton.expanded_fp8 import to_e4m3

LARGEST_EXPONENT = tl.constexpr(form.LARGEST_EXPONENT)
LARGEST_FRACTION = tl.constexpr(form.LARGEST_FRACTION)
NOT_FINITE = tl.constexpr(form.NOT_FINITE)


@triton.jit
def microscaled(x):
    """Codes of fp32 x [rows, group], and exponents [rows, 1]: uint8 both."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=1, keep_dims=True)  # of floats without sign, as of integers
    is_broken = largest >= 0x7F800000
    exponent = (largest >> 23) - LARGEST_EXPONENT
    exponent += ((largest & 0x7FFFFF) > LARGEST_FRACTION).to(tl.int32)
    exponent = tl.where(is_broken, NOT_FINITE, tl.maximum(exponent, 1))
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    code = to_e4m3(magnitude.to(tl.float32, bitcast=True) * inverse) | ((bits >> 24) & 0x80)
    code = tl.where(is_broken, 0x7F, code)
    return code.to(tl.uint8), exponent.to(tl.uint8)
