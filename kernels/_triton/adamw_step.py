"""`memrt.kernels.adamw_step` in Triton: one element's update, and its rounding at the store.

Kernels that use it are launched with `enable_fp_fusion=False`: a fused multiply-add rounds once
where PyTorch rounds twice, and the codes of the moments would differ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memrt.kernels._triton.stochastic_rounding import nearest_carry, random_bits, round_to_bf16


@triton.jit
def stepped(
    p, g, m_before, v_before, decay, step_size, beta1, rest1, beta2, rest2, correction, eps
):
    """p, m and v after the step, all fp32."""
    m = beta1 * m_before + rest1 * g
    v = beta2 * v_before + rest2 * g * g
    p_after = p * decay - step_size * m / (tl.sqrt(v) * correction + eps)
    finite = tl.abs(g) < float("inf")
    return (
        tl.where(finite, p_after, p),
        tl.where(finite, m, m_before),
        tl.where(finite, v, v_before),
    )


@triton.jit
def store_parameter(p_ptr, offsets, p, mask, key0, key1, step, STOCHASTIC: tl.constexpr):
    """Store p (fp32) in the parameter's dtype."""
    if p_ptr.dtype.element_ty == tl.bfloat16:
        carry = nearest_carry(p)
        if STOCHASTIC:
            carry = random_bits(offsets, key0, key1, step)
        tl.store(p_ptr + offsets, round_to_bf16(p, carry), mask=mask)
    else:
        tl.store(p_ptr + offsets, p.to(p_ptr.dtype.element_ty), mask=mask)
