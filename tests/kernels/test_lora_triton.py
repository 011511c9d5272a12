"""The Triton kernels of LoRA's branch: interpreted on the CPU, and compiled for four GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels.lora import lora, lora_reference
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted

pytest.importorskip("triton", reason="Triton is not installed")

SCALING = 1.7
RESULTS = ("z", "dy", "dx", "da", "db")
# 8 warps of 128 registers a thread leave room for 2 programs on a multiprocessor
MAX_REGISTERS = 128


def call_of(
    tokens: int,
    width: int,
    out: int,
    rank: int,
    base: torch.dtype,
    adapter: torch.dtype,
    *,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """Inputs and the gradient of Z, with results that are poisoned."""
    generator = torch.Generator().manual_seed(tokens + rank)

    def made(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(to)

    call = {
        "y": made(tokens, out, to=base),
        "x": made(tokens, width, to=base),
        "a": (made(rank, width, to=torch.float32) / width**0.5).to(adapter),
        "b": (made(out, rank, to=torch.float32) / rank**0.5).to(adapter),
        "gradient": made(tokens, out, to=base),
        "dropout": dropout,
    }
    shapes = zip(RESULTS, ("y", "y", "x", "a", "b"), strict=True)
    return call | {name: torch.full_like(call[like], float("nan")) for name, like in shapes}


def fill(**call: Any) -> None:
    """Run the operator, forward and backward, into the poisoned results."""
    for name, found in results_of(call, lora).items():
        call[name].copy_(found)


def results_of(call: dict[str, Any], operator: Any, *, wide: bool = False) -> dict[str, Tensor]:
    leaves = [
        (each.double() if wide else each.detach().clone()).requires_grad_()
        for each in (call["y"], call["x"], call["a"], call["b"])
    ]
    torch.manual_seed(3)  # of the dropout
    result = operator(*leaves, scaling=SCALING, dropout=call["dropout"])
    gradients = torch.autograd.grad(result, leaves, call["gradient"].to(result.dtype))
    return dict(zip(RESULTS, (result.detach(), *gradients), strict=True))


def assert_as_close_as_the_reference(call: dict[str, Any], found: dict[str, Tensor]) -> None:
    truth, plain = results_of(call, lora_reference, wide=True), results_of(call, lora_reference)
    for name in RESULTS:
        true, eps = truth[name], torch.finfo(plain[name].dtype).eps
        limit = 2 * (plain[name].double() - true).norm() + eps * true.norm()
        assert (found[name].double() - true).norm() <= limit, name


def test_the_interpreted_kernels_are_as_close_to_fp64_as_the_reference() -> None:
    """One tile and several, of tokens, widths and ranks; several parts of a gradient's sum."""
    half, single = torch.float16, torch.float32
    calls = [
        call_of(tokens, width, out, rank, base, adapter)
        for tokens, width, out, rank, base, adapter in (
            (1, 40, 24, 4, single, single),
            (67, 100, 72, 16, half, single),
            (70, 24, 130, 72, single, single),
            (2100, 20, 17, 3, half, single),
            (67, 100, 72, 8, half, half),
        )
    ]
    calls.append(call_of(70, 40, 24, 8, single, single, dropout=0.3))
    found = call_interpreted("tests.kernels.test_lora_triton:fill", calls)
    for call, left in zip(calls, found, strict=True):
        assert_as_close_as_the_reference(call, left)


POINTERS = {
    "lora_down_kernel": {"wide_ptr": "*bf16", "weight_ptr": "*fp32", "low_ptr": "product"},
    "lora_up_kernel": {
        "low_ptr": "product",
        "weight_ptr": "*fp32",
        "base_ptr": "*bf16",
        "out_ptr": "*bf16",
    },
    "lora_outer_kernel": {"low_ptr": "product", "wide_ptr": "*bf16", "part_ptr": "*fp32"},
}


def blocks_of(kernel: str, element_size: int) -> dict[str, int]:
    """The largest tiles of the launcher."""
    inner = 64 // element_size
    if kernel == "lora_down_kernel":
        return {"BLOCK_TOKENS": 32, "BLOCK_WIDTH": 2 * inner, "BLOCK_RANK": 64}
    if kernel == "lora_up_kernel":
        return {"BLOCK_TOKENS": 64, "BLOCK_WIDTH": 64, "BLOCK_RANK": inner, "HAS_BASE": True}
    return {"BLOCK_TOKENS": inner, "BLOCK_WIDTH": 64, "BLOCK_RANK": 64}


@pytest.mark.parametrize("kernel", POINTERS)
@pytest.mark.parametrize(
    ("product", "precision"),
    [
        ("*fp32", "ieee"),
        ("*bf16", "ieee"),
        pytest.param("*fp32", "tf32", marks=pytest.mark.slow),
    ],
)
def test_they_compile_for_every_architecture_without_spills(
    kernel: str, product: str, precision: str, record_property: Callable[[str, object], None]
) -> None:
    pointers = {
        name: product if kind == "product" else kind for name, kind in POINTERS[kernel].items()
    }
    numbers = dict.fromkeys(("num_tokens", "width", "rank", "tokens_a_split"), "i32")
    found = compile_ahead(
        f"memrt.kernels._triton.lora:{kernel}",
        {**pointers, **numbers, "scale": "fp32"},
        {
            **blocks_of(kernel, 4 if product == "*fp32" else 2),
            "RANK_FIRST": False,
            "PRECISION": precision,
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
    for base in (torch.float32, torch.bfloat16, torch.float16):
        for rank in (4, 16, 72):
            call = call_of(2100, 520, 200, rank, base, torch.float32)
            on_device = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in call.items()}
            found = results_of(on_device, lora)
            moved = {name: value.cpu() for name, value in found.items()}
            assert_as_close_as_the_reference(call, moved)
