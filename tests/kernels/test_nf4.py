"""NF4 against its formula, against bitsandbytes, and against fp64; its bytes; the CPU defect."""

from __future__ import annotations

import builtins
import json
import math
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from memrt.kernels import nf4
from memrt.kernels.dynamic_map import dynamic_map
from memrt.kernels.nf4 import (
    BLOCK_SIZE,
    LEVELS,
    nf4_bytes,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_quantize,
    nf4_quantize_reference,
)
from memrt.profiling.accounts import Account
from memrt.profiling.kernel_scratch import scratch_of
from memrt.profiling.ledger import Ledger

SHAPES = [(1,), (67,), (5, 32), (6, 160), (1000,), (64, 64), (33, 129), (300, 512)]
HALF_STEP = max(b - a for a, b in pairwise(LEVELS)) / 2
# the outer map's steps: seven decades, the coarsest step between two values that are not its ends
OUTER_STEP = max(b - a for a, b in pairwise(dynamic_map(signed=True)))


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_of_the_reference(shape: tuple[int, ...]) -> None:
    """Codes may differ where a value lies on a midpoint to within fp32; the values may not."""
    weight = weight_of(shape)
    packed, expected = nf4_quantize(weight), nf4_quantize_reference(weight)
    assert packed.shape == expected.shape == (nf4_bytes(weight.numel()),)
    assert (packed != expected).sum() <= max(2, 1e-3 * weight.numel())
    dense = nf4_dequantize(packed, shape, torch.float32)
    assert torch.allclose(dense, nf4_dequantize_reference(packed, shape, torch.float32), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_half_a_step_of_levels_and_of_scales(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """In the shapes where bitsandbytes' own `dequantize_4bit` is wrong on AVX-512, too."""
    weight = weight_of(shape, dtype)
    dense = nf4_dequantize(nf4_quantize(weight), shape, dtype)
    assert dense.dtype == dtype
    flat = weight.double().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(dim=1)
    outer = (scales - scales.mean()).abs().max()
    allowed = HALF_STEP * scales + OUTER_STEP * outer
    allowed = allowed.repeat_interleave(BLOCK_SIZE)[: len(flat)]
    rounding = torch.finfo(dtype).eps * flat.abs()
    error = (dense.double().flatten() - flat).abs()
    assert (error <= 1.01 * allowed + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_and_values_of_bitsandbytes(dtype: torch.dtype) -> None:
    nf4._operators()
    from bitsandbytes import functional

    weight = weight_of((300, 512), dtype)
    codes, state = functional.quantize_4bit(
        weight, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True
    )
    parts = nf4._parts(nf4_quantize(weight), weight.numel())
    assert torch.equal(parts.codes, codes.flatten())
    assert torch.equal(parts.scale_codes, state.absmax)
    assert torch.equal(parts.outer_scales, state.state2.absmax)
    assert torch.equal(parts.offset, state.offset.view(1))
    dense = nf4_dequantize(nf4_quantize(weight), weight.shape, dtype)
    assert torch.equal(dense, functional.dequantize_4bit(codes, state))
    assert torch.equal(state.code, torch.tensor(LEVELS))


def test_bytes_are_four_bits_and_an_eighth() -> None:
    num_elements = 8192 * 8192
    assert 8 * nf4_bytes(num_elements) / num_elements == pytest.approx(4.127, abs=5e-4)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of((33, 129))
    whole = nf4_quantize(weight)
    monkeypatch.setattr(nf4, "CPU_PIECE_ELEMENTS", 256)
    assert torch.equal(nf4_quantize(weight), whole)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_extreme_magnitudes(scale: float) -> None:
    weight = scale * weight_of((4, 64))
    dense = nf4_dequantize(nf4_quantize(weight), (4, 64), torch.float32)
    assert torch.isfinite(dense).all()
    assert (dense - weight).abs().max() <= 0.2 * weight.abs().max()


def test_strided_and_empty_weights() -> None:
    weight = weight_of((64, 130))
    assert torch.equal(nf4_quantize(weight.t()), nf4_quantize(weight.t().contiguous()))
    empty = nf4_quantize(torch.empty(0, 4))
    assert nf4_dequantize(empty, (0, 4), torch.float32).shape == (0, 4)


@pytest.mark.parametrize("shape", [(64, 64), (33, 129), (1024, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_is_what_the_operator_takes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The declared bytes are an upper bound, not far."""
    weight = weight_of(shape, dtype)
    packed = nf4_quantize(weight)
    nf4_dequantize(packed, shape, dtype)  # maps are made once
    taken = scratch(lambda: nf4_quantize(weight), "memrt::nf4_quantize")
    declared = nf4.quantize_workspace_bytes(weight)
    assert taken <= declared + 1024
    assert declared <= 1.7 * taken + 1024
    taken = scratch(lambda: nf4_dequantize(packed, shape, dtype), "memrt::nf4_dequantize")
    assert taken <= nf4.dequantize_workspace_bytes(packed, shape, dtype) <= taken + 64


def scratch(call: Callable[[], object], operator: str) -> int:
    """What torch's profiler saw an operator allocate and free inside itself."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        call()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]
    return scratch_of(events, {operator})[operator]


def test_the_ledger_sees_the_dense_weight_and_the_scales() -> None:
    packed = nf4_quantize(weight_of((300, 512)))
    with Ledger() as ledger:
        ledger.tag(packed, Account.WEIGHTS)
        dense = nf4_dequantize(packed, (300, 512), torch.bfloat16)
    scales = 4 * 300 * 512 // 64
    peak = ledger.timeline.peak()
    assert peak.accounts["workspace"] == dense.nbytes + scales
    assert peak.accounts["weights"] == packed.nbytes


def test_opcheck() -> None:
    weight = weight_of((5, 67))
    torch.library.opcheck(nf4_quantize, (weight,))
    torch.library.opcheck(nf4_dequantize, (nf4_quantize(weight), [5, 67], torch.bfloat16))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float64.*fp32, bf16 and fp16"):
        nf4_quantize(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"4096 elements in NF4 has 2144 "):
        nf4_dequantize(torch.zeros(7, dtype=torch.uint8), [64, 64], torch.float32)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "bitsandbytes":
            raise ImportError("no such module")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install bitsandbytes, or use the strategy int8"):
        nf4_quantize(torch.zeros(4, 4))
