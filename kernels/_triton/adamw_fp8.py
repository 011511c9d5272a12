"""`memrt.kernels.adamw_fp8` in Triton: one pass over parameter, gradient and state.

A program takes 4 groups of 128 elements, 4 elements a thread with 4 warps: their moments stay in
registers between decoding, update and coding (of 8 elements Triton 3.6 keeps 145 registers, and
only 3 programs fit on a multiprocessor). 10.2 bytes an element of traffic for bf16. Decoding
is a look-up in the row of the group's power: 1 KiB, which the first-level cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from memrt.kernels._triton.adamw_step import stepped, store_parameter
from memrt.kernels._triton.expanded_fp8 import dequantize, quantize
from memrt.kernels._triton.launching import on_device_of
from memrt.kernels.dispatch import require_triton
from memrt.kernels.expanded_fp8 import GROUP_SIZE, decoding_table, num_groups

GROUPS = 4
NUM_WARPS = 4


class One(NamedTuple):
    """A parameter's share of a step; all tensors contiguous, parameter and gradient flat."""

    parameter: Tensor
    gradient: Tensor
    state: Sequence[Tensor]
    scalars: Sequence[float]
    rounding_key: Sequence[int] | None
    step: int


@triton.jit
def step_groups(
    group,
    p_ptr,
    g_ptr,
    m_codes_ptr,
    v_codes_ptr,
    m_largest_ptr,
    v_largest_ptr,
    m_power_ptr,
    v_power_ptr,
    table_ptr,
    num_elements,
    decay,
    step_size,
    beta1,
    rest1,
    beta2,
    rest2,
    correction,
    eps,
    key0,
    key1,
    step,
    STOCHASTIC: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Load, step and store these groups (int64 [groups, 1]) of one parameter."""
    offsets = group * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    mask = offsets < num_elements
    exists = group * GROUP_SIZE < num_elements

    p = tl.load(p_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    m_codes = tl.load(m_codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    v_codes = tl.load(v_codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    m_largest = tl.load(m_largest_ptr + group, mask=exists, other=0.0)
    v_largest = tl.load(v_largest_ptr + group, mask=exists, other=0.0)
    m_power = tl.load(m_power_ptr + group, mask=exists, other=1).to(tl.int32)
    v_power = tl.load(v_power_ptr + group, mask=exists, other=1).to(tl.int32)

    m_before = dequantize(m_codes, m_largest, m_power, table_ptr, mask, False)
    v_before = dequantize(v_codes, v_largest, v_power, table_ptr, mask, True)
    p, m, v = stepped(
        p, g, m_before, v_before, decay, step_size, beta1, rest1, beta2, rest2, correction, eps
    )
    store_parameter(p_ptr, offsets, p, mask, key0, key1, step, STOCHASTIC)
    m_codes, m_largest, m_power = quantize(m, POSITIVE=False)
    tl.store(m_codes_ptr + offsets, m_codes.to(tl.uint8), mask=mask)
    tl.store(m_largest_ptr + group, m_largest, mask=exists)
    tl.store(m_power_ptr + group, m_power.to(tl.uint8), mask=exists)
    v_codes, v_largest, v_power = quantize(v, POSITIVE=True)
    tl.store(v_codes_ptr + offsets, v_codes.to(tl.uint8), mask=mask)
    tl.store(v_largest_ptr + group, v_largest, mask=exists)
    tl.store(v_power_ptr + group, v_power.to(tl.uint8), mask=exists)


@triton.jit(do_not_specialize=["key0", "key1", "step"])
def adamw_fp8_kernel(
    p_ptr,
    g_ptr,
    m_codes_ptr,
    v_codes_ptr,
    m_largest_ptr,
    v_largest_ptr,
    m_power_ptr,
    v_power_ptr,
    table_ptr,
    num_elements,
    decay,
    step_size,
    beta1,
    rest1,
    beta2,
    rest2,
    correction,
    eps,
    key0,
    key1,
    step,
    STOCHASTIC: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The formula of `memrt.kernels.adamw_fp8` on `GROUPS` groups of one parameter."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    step_groups(
        group,
        p_ptr,
        g_ptr,
        m_codes_ptr,
        v_codes_ptr,
        m_largest_ptr,
        v_largest_ptr,
        m_power_ptr,
        v_power_ptr,
        table_ptr,
        num_elements,
        decay,
        step_size,
        beta1,
        rest1,
        beta2,
        rest2,
        correction,
        eps,
        key0,
        key1,
        step,
        STOCHASTIC,
        GROUP_SIZE,
    )


def launch(one: One) -> None:
    """One launch for one parameter."""
    parameter, gradient, state, scalars, rounding_key, step = one
    require_triton(parameter, gradient, *state)
    n = parameter.numel()
    if n == 0:
        return
    with on_device_of(parameter):
        adamw_fp8_kernel[(triton.cdiv(num_groups(n), GROUPS),)](
            parameter,
            gradient,
            *state,
            decoding_table(parameter.device),
            n,
            *scalars,
            *(rounding_key or (0, 0)),
            step,
            STOCHASTIC=rounding_key is not None,
            GROUP_SIZE=GROUP_SIZE,
            GROUPS=GROUPS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # the reference's bits
        )
