"""The Triton kernels on a formed gradient: interpreted on the CPU, and compiled for four GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels import formed_gradient as module
from memrt.kernels.formed_gradient import (
    add_channels_,
    add_channels_reference,
    channel_norms,
    channel_norms_reference,
    norms_workspace_bytes,
)
from memrt.kernels.stochastic_rounding import (
    Rounding,
    random_bits_reference,
    rounding_key,
    stochastic_round_reference,
)
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.live_bytes import LiveBytes

pytest.importorskip("triton", reason="Triton is not installed")

# 4 warps of 96 registers a thread leave room for 5 programs on a multiprocessor
MAX_REGISTERS = 96
EPS = 2**-24
KEY = rounding_key(3, 4)
# one tile and several, ragged; one span of a channel and several
SHAPES = [(67, 600), (600, 67), (5, 5), (1, 513), (3, 1)]


def normal(shape: tuple[int, int], dtype: torch.dtype, *, seed: int, turned: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator).to(dtype)
    return made.t().contiguous().t() if turned else made


def write_call(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    scalar: bool = False,
    stochastic: bool = False,
    turned: bool = False,
) -> dict[str, Any]:
    factors = torch.rand((max(shape),), generator=torch.Generator().manual_seed(1))
    return {
        "weight": normal(shape, dtype, seed=2, turned=turned),
        "gradient": normal(shape, dtype, seed=3, turned=False),
        "factors": factors[0].clone() if scalar else factors,
        "alpha": -0.3,
        "decay": 0.99,
        "left": shape[0] < shape[1],
        "step": torch.tensor(5.0) if stochastic else None,
        "rounding_key": KEY if stochastic else None,
    }


def expected_of(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The reference, in fp32 and rounded to the weight's dtype."""
    options = {name: call[name] for name in ("alpha", "decay", "left")}
    wide = add_channels_reference(call["weight"], call["gradient"], call["factors"], **options)
    if call["step"] is None:
        return wide, wide.to(call["weight"].dtype)
    index = torch.arange(wide.numel()).view(wide.shape)
    bits = random_bits_reference(index, torch.tensor(call["rounding_key"]), call["step"])
    return wide, stochastic_round_reference(wide.contiguous(), bits)


def test_the_interpreted_write_is_the_reference() -> None:
    calls = [
        write_call(shape, dtype, stochastic=stochastic)
        for shape in SHAPES
        for dtype, stochastic in (
            (torch.float32, False),
            (torch.float16, False),
            (torch.bfloat16, False),
            (torch.bfloat16, True),
        )
    ]
    calls.append(write_call((67, 600), torch.float32, scalar=True))
    calls.append(write_call((33, 70), torch.float32, turned=True))
    calls.append(write_call((33, 70), torch.bfloat16, stochastic=True, turned=True))
    found = call_interpreted("memrt.kernels.formed_gradient:_add_channels", calls)
    for call, left in zip(calls, found, strict=True):
        wide, expected = expected_of(call)
        if expected.dtype == torch.float32:
            # two sums and products, of numbers below 8
            torch.testing.assert_close(left["weight"], wide, rtol=4 * EPS, atol=16 * EPS)
        else:  # an fp32 rounding seldom reaches the edge of a narrow one
            assert float((left["weight"] == expected).float().mean()) > 0.999
            eps = torch.finfo(expected.dtype).eps
            torch.testing.assert_close(left["weight"], expected, rtol=2 * eps, atol=16 * EPS)


def test_the_interpreted_norms_are_as_close_to_fp64_as_the_reference() -> None:
    """Written by a kernel that adds up spans, whose number the shapes say."""
    calls = [
        {"matrix": normal(shape, dtype, seed=4, turned=turned), "left": shape[0] < shape[1]}
        for shape in [*SHAPES, (300, 310)]
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for turned in (False, True)
    ]
    found = call_interpreted(
        "tests.kernels.test_formed_gradient_triton:norms_into",
        [
            {
                **call,
                "norms": torch.full((max(call["matrix"].shape),), float("nan")),
                "bytes_found": torch.zeros(2),
            }
            for call in calls
        ],
    )
    for call, left in zip(calls, found, strict=True):
        truth = call["matrix"].double().norm(dim=0 if call["left"] else 1)
        plain = channel_norms_reference(**call).double()
        limit = 2 * (plain - truth).abs().max() + 4 * EPS * truth.max()
        assert float((left["norms"].double() - truth).abs().max()) <= float(limit)
        seen, declared = left["bytes_found"].tolist()
        assert seen == declared + 4 * truth.numel()


def norms_into(matrix: Tensor, left: bool, norms: Tensor, bytes_found: Tensor) -> None:
    """What the interpreter's process calls: results and bytes come back in arguments."""
    with LiveBytes([matrix, norms, bytes_found]) as seen:
        found = module._channel_norms._init_fn(matrix, left)
    norms.copy_(found)
    bytes_found.copy_(torch.tensor([seen.peak_bytes, norms_workspace_bytes(matrix, left)]))


def check(found: dict[int, Any], record_property: Callable[[str, object], None]) -> None:
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.registers <= MAX_REGISTERS, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture], resources


def test_the_write_compiles_for_every_architecture_without_spills(
    record_property: Callable[[str, object], None],
) -> None:
    sizes = ("num_rows", "num_columns", "weight_row", "gradient_row", "key0", "key1")
    found = compile_ahead(
        "memrt.kernels._triton.formed_gradient:add_channels_kernel",
        {
            **dict.fromkeys(("weight_ptr", "gradient_ptr"), "*bf16"),
            **dict.fromkeys(("factors_ptr", "step_ptr"), "*fp32"),
            **dict.fromkeys(sizes, "i32"),
            **dict.fromkeys(("alpha", "decay"), "fp32"),
        },
        {
            **dict.fromkeys(("weight_column", "gradient_column"), 1),
            "BY_ROW": False,
            "BY_COLUMN": True,
            "STOCHASTIC": True,
            "BLOCK_ROWS": 4,
            "BLOCK_COLUMNS": 512,
        },
        num_warps=4,
        enable_fp_fusion=False,
    )
    check(found, record_property)


@pytest.mark.parametrize("columns", [True, False])
def test_the_norms_compile_for_every_architecture_without_spills(
    columns: bool, record_property: Callable[[str, object], None]
) -> None:
    strides = ("channel_stride", "inner_stride")
    unit, other = strides if columns else strides[::-1]
    found = compile_ahead(
        "memrt.kernels._triton.formed_gradient:channel_squares_kernel",
        {
            "matrix_ptr": "*bf16",
            "sums_ptr": "*fp32",
            **dict.fromkeys(("num_channels", "length", other, "span"), "i32"),
        },
        {
            unit: 1,
            "BLOCK_CHANNELS": 128 if columns else 4,
            "BLOCK_INNER": 16 if columns else 512,
        },
        num_warps=4,
        enable_fp_fusion=True,
    )
    check(found, record_property)


@pytest.mark.gpu
def test_a_gpu_is_the_reference() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for dtype, stochastic in ((torch.float32, False), (torch.bfloat16, True)):
        for shape in ((1000, 3001), (3001, 1000)):
            call = write_call(shape, dtype, stochastic=stochastic)
            wide, expected = expected_of(call)
            moved = [call[name].cuda() for name in ("weight", "gradient", "factors")]
            rounding = Rounding(KEY, call["step"].cuda()) if stochastic else None
            options = {name: call[name] for name in ("alpha", "decay", "left")}
            add_channels_(*moved, rounding=rounding, **options)
            if dtype == torch.float32:
                torch.testing.assert_close(moved[0].cpu(), wide, rtol=4 * EPS, atol=16 * EPS)
            else:
                assert float((moved[0].cpu() == expected).float().mean()) > 0.999
            norms = channel_norms(moved[1], left=call["left"]).cpu()
            truth = call["gradient"].double().norm(dim=0 if call["left"] else 1)
            torch.testing.assert_close(norms.double(), truth, rtol=1e-6, atol=0)
