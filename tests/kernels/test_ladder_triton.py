"""The Triton kernel of a ladder's rung: interpreted on the CPU, and compiled for four GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels.ladder import ladder_down, ladder_reference
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted

pytest.importorskip("triton", reason="Triton is not installed")

# 8 warps of 128 registers a thread leave room for 2 programs on a multiprocessor
MAX_REGISTERS = 128
TENSORS = ("hidden_ptr", "weight_ptr", "bias_ptr", "state_ptr", "mixed_ptr", "difference_ptr")


def call_of(
    tokens: int, hidden: int, side: int, dtype: torch.dtype, *, vector: bool, bias: bool
) -> dict[str, Any]:
    """Arguments of the launcher, with outputs that are poisoned."""
    generator = torch.Generator().manual_seed(tokens + side)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    poisoned = torch.full((tokens, side), float("nan"), dtype=dtype)
    return {
        "hidden": made(tokens, hidden),
        "weight": made(side, hidden) / hidden**0.5,
        "bias": made(side) if bias else None,
        "state": made(tokens, side),
        "gate": torch.rand(side if vector else 1, generator=generator),
        "mixed": poisoned.clone(),
        "difference": poisoned.clone(),
    }


def inputs_of(call: dict[str, Any], dtype: torch.dtype) -> list[Any]:
    names = ("hidden", "weight", "bias", "state", "gate")
    return [None if call[name] is None else call[name].to(dtype) for name in names]


def test_the_interpreted_kernel_is_as_close_to_fp64_as_the_reference() -> None:
    """Odd and even shapes, one tile and several, ends of the gate; no element is left unwritten."""
    calls = [
        call_of(tokens, hidden, side, dtype, vector=vector, bias=bias)
        for dtype in (torch.float32, torch.float16)
        for tokens, hidden, side, vector, bias in (
            (1, 40, 10, False, True),
            (67, 100, 16, True, False),
            (130, 96, 72, True, True),
        )
    ]
    calls.append({**call_of(9, 32, 16, torch.float32, vector=False, bias=True)})
    calls[-1]["gate"] = torch.ones(1)
    found = call_interpreted("memrt.kernels._triton.ladder:launch", calls)
    for call, left in zip(calls, found, strict=True):
        dtype = call["hidden"].dtype
        truth = ladder_reference(*inputs_of(call, torch.float64))
        plain = ladder_reference(*inputs_of(call, dtype))
        limit = 2 * (plain.double() - truth).norm() + torch.finfo(dtype).eps * truth.norm()
        assert (left["mixed"].double() - truth).norm() <= limit
        down = torch.nn.functional.linear(*inputs_of(call, torch.float64)[:3])
        difference = call["state"].double() - down
        error = (left["difference"].double() - difference).norm()
        assert error <= 4 * torch.finfo(dtype).eps * (down.norm() + call["state"].double().norm())
    assert torch.equal(found[-1]["mixed"], calls[-1]["state"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_compiles_for_every_architecture_without_spills(
    dtype: str, record_property: Callable[[str, object], None]
) -> None:
    found = compile_ahead(
        "memrt.kernels._triton.ladder:ladder_down_kernel",
        {
            **dict.fromkeys(TENSORS, f"*{dtype}"),
            "gate_ptr": "*fp32",
            **dict.fromkeys(("num_tokens", "side", "hidden_size"), "i32"),
        },
        {
            "HAS_BIAS": True,
            "SCALAR_GATE": False,
            "BLOCK_TOKENS": 64,
            "BLOCK_SIDE": 64,
            "BLOCK_HIDDEN": 32 if dtype == "bf16" else 16,
        },
        num_warps=8,
    )
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture], resources
        assert resources.registers <= MAX_REGISTERS, resources


@pytest.mark.gpu
def test_a_gpu_is_as_close_to_fp64_as_the_reference() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call = call_of(1000, 520, 72, dtype, vector=True, bias=True)
        moved = [None if v is None else v.cuda() for v in inputs_of(call, dtype)]
        moved[4] = call["gate"].cuda()
        moved[1].requires_grad_()
        truth = ladder_reference(*inputs_of(call, torch.float64))
        plain = ladder_reference(*inputs_of(call, dtype))
        limit = 2 * (plain.double() - truth).norm() + torch.finfo(dtype).eps * truth.norm()
        assert (ladder_down(*moved).detach().cpu().double() - truth).norm() <= limit
