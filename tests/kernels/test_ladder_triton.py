"""The Triton kernels of a ladder's rung: interpreted on the CPU, and compiled for four GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels.ladder import _down, ladder_down, ladder_reference
from memrt.kernels.ladder_gradients import strips_of
from memrt.kernels.microscaled_fp8 import microscale
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted

pytest.importorskip("triton", reason="Triton is not installed")

# 8 warps of 128 registers a thread leave room for 2 programs on a multiprocessor
MAX_REGISTERS = 128
MIX_TOKENS = 16  # of the launchers
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


def rung(
    hidden: Tensor,
    weight: Tensor,
    state: Tensor | None,
    gate: Tensor | None,
    kept: str,
    results: list[Tensor],
) -> None:
    """Fill `results`: Z and the gradients of weight, state and gate."""
    given = [None if each is None else each.requires_grad_() for each in (state, gate)]
    mixed = ladder_down(hidden, weight.requires_grad_(), None, *given, kept=kept)
    mixed.backward(torch.linspace(-1, 1, mixed.numel()).view(mixed.shape).to(mixed.dtype))
    leaves = [leaf for leaf in (weight, *given) if leaf is not None]
    for result, found in zip(results, (mixed, *(leaf.grad for leaf in leaves)), strict=True):
        assert found is not None
        result.copy_(found.detach())
        assert found.is_contiguous()
    for leaf in leaves:
        leaf.requires_grad_(False).grad = None


def test_the_operator_hands_its_tensors_to_the_kernels() -> None:
    """Leading dimensions, strides, with a state and alone, exact and in eight bits."""
    generator = torch.Generator().manual_seed(3)
    calls = []
    for kept, alone in (("exact", False), ("float8", False), ("float8", True)):
        hidden, weight, state = (
            torch.randn(*shape, generator=generator)
            for shape in ((3, 7, 2, 40), (24, 40), (3, 7, 24))
        )
        given = [] if alone else [state, torch.rand(24, generator=generator)]
        calls.append(
            {
                "hidden": hidden[:, :, 0],
                "weight": weight,
                "state": None if alone else state,
                "gate": None if alone else given[1],
                "kept": kept,
                "results": [
                    torch.empty(3, 7, 24),
                    torch.empty(24, 40),
                    *map(torch.empty_like, given),
                ],
            }
        )
    found = call_interpreted("tests.kernels.test_ladder_triton:rung", calls)
    for call, left in zip(calls, found, strict=True):
        rung(**call)
        for a, b in zip(left["results"], call["results"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("keeps", [False, True], ids=["exact", "float8"])
def test_it_compiles_for_every_architecture_without_spills(
    keeps: bool, dtype: str, record_property: Callable[[str, object], None]
) -> None:
    found = compile_ahead(
        "memrt.kernels._triton.ladder:ladder_down_kernel",
        {
            **dict.fromkeys(TENSORS, f"*{dtype}"),
            "gate_ptr": "*fp32",
            **dict.fromkeys(("codes_ptr", "exponents_ptr"), "*u8" if keeps else f"*{dtype}"),
            **dict.fromkeys(("num_tokens", "side", "hidden_size"), "i32"),
        },
        {
            "HAS_BIAS": True,
            "HAS_STATE": True,
            "SCALAR_GATE": False,
            "KEEPS": keeps,
            "BLOCK_TOKENS": 32 if keeps and dtype == "fp32" else 64,
            "BLOCK_SIDE": 64,
            "BLOCK_HIDDEN": 32 if keeps or dtype == "bf16" else 16,
        },
        num_warps=8,
    )
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture], resources
        assert resources.registers <= MAX_REGISTERS, resources


def mix_call(
    tokens: int, side: int, dtype: torch.dtype, *, vector: bool, wide: torch.dtype | None = None
) -> dict[str, Any]:
    """Arguments of the launcher of gate and sum alone, with outputs that are poisoned."""
    generator = torch.Generator().manual_seed(tokens + side)
    down, state = (torch.randn(tokens, side, generator=generator) for _ in range(2))
    poisoned = torch.full((tokens, side), float("nan"))
    return {
        "down": down.to(wide or dtype),
        "state": state.to(dtype),
        "gate": torch.rand(side if vector else 1, generator=generator),
        "mixed": poisoned.clone().to(dtype),
        "difference": poisoned.clone().to(torch.promote_types(wide or dtype, dtype)),
    }


def test_the_interpreted_mix_is_as_close_to_fp64_as_the_reference() -> None:
    calls = [
        mix_call(1, 10, torch.float32, vector=False),
        mix_call(67, 72, torch.float16, vector=True),
        mix_call(40, 16, torch.float16, vector=True, wide=torch.float32),
    ]
    calls.append({**mix_call(5, 16, torch.float32, vector=False), "gate": torch.ones(1)})
    found = call_interpreted("memrt.kernels._triton.ladder:launch_mix", calls)
    for call, left in zip(calls, found, strict=True):
        down, state, gate = (call[name].double() for name in ("down", "state", "gate"))
        eps = torch.finfo(call["state"].dtype).eps
        truth = gate * state + (1 - gate) * down
        size = down.norm() + state.norm()
        assert (left["mixed"].double() - truth).norm() <= eps * size
        assert (left["difference"].double() - (state - down)).norm() <= eps * size
    assert torch.equal(found[-1]["mixed"], calls[-1]["state"])


def gradients_call(
    tokens: int, side: int, dtype: torch.dtype, *, vector: bool, asked: tuple[bool, bool, bool]
) -> dict[str, Any]:
    """Arguments of the backward launcher; `asked`: for dS, for dg, for the sum of dD."""
    generator = torch.Generator().manual_seed(tokens + side)
    gradient, difference = (torch.randn(tokens, side, generator=generator) for _ in range(2))
    poisoned = torch.full((tokens, side), float("nan"), dtype=dtype)
    sums = torch.full((strips_of(tokens)[0], side), float("nan"))
    has_state, has_gate, has_sums = asked
    return {
        "gradient": gradient.to(dtype),
        "difference": difference.to(dtype) if has_gate else None,
        "gate": torch.rand(side if vector else 1, generator=generator),
        "d_state": poisoned.clone() if has_state else None,
        "d_down": poisoned.clone(),
        "gate_sums": sums.clone() if has_gate else None,
        "down_sums": sums.clone() if has_sums else None,
    }


def test_the_interpreted_backward_is_as_close_to_fp64_as_the_reference() -> None:
    """One strip and several, an uneven last one, and whatever nobody asks for left out."""
    everything, least = (True, True, True), (False, False, False)
    calls = [
        gradients_call(1, 10, torch.float32, vector=False, asked=everything),
        gradients_call(67, 72, torch.float32, vector=True, asked=everything),
        gradients_call(67, 16, torch.float16, vector=True, asked=everything),
        gradients_call(40, 16, torch.float32, vector=False, asked=least),
        gradients_call(40, 16, torch.float32, vector=False, asked=(False, True, False)),
    ]
    found = call_interpreted("memrt.kernels._triton.ladder:launch_gradients", calls)
    for call, left in zip(calls, found, strict=True):
        gradient, gate, eps = call["gradient"].double(), call["gate"].double(), 2**-24
        narrow = torch.finfo(call["gradient"].dtype).eps
        expected = {"d_down": gradient * (1 - gate)}
        if call["d_state"] is not None:
            expected["d_state"] = gradient * gate
        for name, truth in expected.items():
            assert (left[name].double() - truth).norm() <= 2 * narrow * gradient.norm(), name
        if call["down_sums"] is not None:
            truth = left["d_down"].double().sum(dim=0)  # of what was written, rounded
            limit = 64 * eps * left["d_down"].double().abs().sum(dim=0) + 1e-30
            assert bool(((left["down_sums"].double().sum(dim=0) - truth).abs() <= limit).all())
        if call["gate_sums"] is not None:
            terms = gradient * call["difference"].double()
            error = (left["gate_sums"].double().sum(dim=0) - terms.sum(dim=0)).abs()
            assert bool((error <= 64 * eps * terms.abs().sum(dim=0) + 1e-30).all())


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 4095, 4096, 4097, 10**6])
def test_strips_cover_all_tokens_once(num_tokens: int) -> None:
    strips, length = strips_of(num_tokens)
    assert 1 <= strips <= 128
    assert length % 32 == 0
    assert (strips - 1) * length < max(1, num_tokens) <= strips * length


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["ladder_mix_kernel", "ladder_gradients_kernel"])
def test_gate_and_sum_compile_for_every_architecture_without_spills(
    kernel: str, dtype: str, record_property: Callable[[str, object], None]
) -> None:
    tensors = ("down_ptr", "state_ptr", "mixed_ptr", "difference_ptr")
    numbers: tuple[str, ...] = ("num_tokens", "side")
    constants: dict[str, Any] = {"SCALAR_GATE": False, "BLOCK_TOKENS": MIX_TOKENS, "BLOCK_SIDE": 64}
    sums: dict[str, str] = {}
    if kernel == "ladder_gradients_kernel":
        tensors = ("gradient_ptr", "difference_ptr", "d_state_ptr", "d_down_ptr")
        sums = {"gate_sums_ptr": "*fp32", "down_sums_ptr": "*fp32"}
        numbers = (*numbers, "strip")
        constants |= {"HAS_STATE": True, "HAS_GATE": True, "HAS_SUMS": True}
    found = compile_ahead(
        f"memrt.kernels._triton.ladder:{kernel}",
        {
            **dict.fromkeys(tensors, f"*{dtype}"),
            "gate_ptr": "*fp32",
            **sums,
            **dict.fromkeys(numbers, "i32"),
        },
        constants,
        num_warps=4,
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
        given = moved[0], moved[1], moved[2], moved[3], moved[4], True
        codes, exponents = microscale(call["hidden"])
        for kept in (_down(*given)[2:], _down(*moved[:3], None, None, True)[2:]):
            assert torch.equal(kept[0].cpu().view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(kept[1].cpu(), exponents)
        truth = ladder_reference(*inputs_of(call, torch.float64))
        plain = ladder_reference(*inputs_of(call, dtype))
        limit = 2 * (plain.double() - truth).norm() + torch.finfo(dtype).eps * truth.norm()
        assert (ladder_down(*moved).detach().cpu().double() - truth).norm() <= limit
