"""Products with a gradient that is never formed: against fp64, in bytes, interpreted, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels import gradient_products as module
from memrt.kernels import mixed_precision
from memrt.kernels.gradient_products import (
    add_gradient_times_,
    gradient_times,
    gradient_times_reference,
    workspace_bytes,
)
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.live_bytes import LiveBytes

OPERATOR = torch.ops.memrt.add_gradient_times.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(1, 5, 7, 3), (67, 40, 24, 5), (200, 24, 130, 17), (0, 8, 6, 2)]
"""Tokens, columns of a and of b, and of the matrix."""


def call_of(
    shape: tuple[int, int, int, int], dtype: torch.dtype, *, transposed: bool = False
) -> dict[str, Any]:
    tokens, rows, inner, columns = shape
    generator = torch.Generator().manual_seed(tokens + rows)
    total = torch.randn(columns, rows, generator=generator)
    return {
        "total": total.t() if transposed else total.t().contiguous(),
        "a": torch.randn(tokens, rows, generator=generator).to(dtype),
        "b": torch.randn(tokens, inner, generator=generator).to(dtype),
        "matrix": torch.randn(inner, columns, generator=generator),
    }


def truth_of(call: dict[str, Any]) -> Tensor:
    wide = {name: value.double() for name, value in call.items()}
    return wide["total"] + gradient_times_reference(wide["a"], wide["b"], wide["matrix"])


def limit_of(call: dict[str, Any]) -> float:
    """Every product of two numbers is right to 2^-21, and sums have random signs."""
    a, b, matrix = (call[name].double().norm() for name in ("a", "b", "matrix"))
    return float(2**-20 * (a * b * matrix / max(1, len(call["a"])) ** 0.5 + call["total"].norm()))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_the_product_in_fp32(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = call_of(shape, dtype, transposed=transposed)
    truth, limit = truth_of(call), limit_of(call)
    product = gradient_times(call["a"], call["b"], call["matrix"])
    assert product.dtype == torch.float32
    assert float((product.double() - (truth - call["total"].double())).norm()) <= limit
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", 200)  # a few tokens at a time
    add_gradient_times_(**call)
    assert float((call["total"].double() - truth).norm()) <= limit


@each_dtype
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
@pytest.mark.parametrize("block", [3000, 2**25])
def test_workspace_is_what_the_body_allocates(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", block)
    call = call_of(shape, dtype)
    with LiveBytes(call.values()) as seen:
        module._add_gradient_times._init_fn(**call)
    assert seen.peak_bytes == workspace_bytes(**call)
    tokens, rows, inner, columns = shape
    wide = 0 if dtype == torch.float32 else max(rows, inner)
    assert seen.peak_bytes <= 4 * max(block, -(-tokens // 8) * (columns + wide))


@each_dtype
def test_a_gpu_makes_the_product_with_the_matrix_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = call_of(SHAPES[2], dtype)
    with FakeTensorMode():
        call = {
            name: torch.empty(value.shape, dtype=value.dtype, device="cuda")
            for name, value in given.items()
        }
        add_gradient_times_(**call)
        assert workspace_bytes(**call) == 4 * 200 * 17
        monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", 1000)
        assert workspace_bytes(**call) == 4 * (1000 // 17) * 17


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool) -> None:
    call = call_of(SHAPES[1], torch.bfloat16, transposed=transposed)
    torch.library.opcheck(OPERATOR, (), call)


def test_wrong_arguments_are_refused() -> None:
    call = call_of(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match=r"matrix \(5, 24\): give"):
        add_gradient_times_(**{**call, "matrix": call["matrix"].t()})
    with pytest.raises(ValueError, match="give fp32"):
        add_gradient_times_(**{**call, "matrix": call["matrix"].bfloat16()})
    with pytest.raises(ValueError, match="tokens"):
        add_gradient_times_(**{**call, "a": call["a"][:3]})


# ---------------------------------------------------------------- Triton


def test_the_interpreted_kernel_is_right_and_the_same_twice() -> None:
    """Every dtype, odd shapes, a transposed sum, strided factors, tokens in pieces."""
    pytest.importorskip("triton", reason="Triton is not installed")
    calls = [
        {**call_of(shape, dtype, transposed=transposed), "piece_tokens": 128}
        for dtype in (*DTYPES, torch.float64)
        for shape in SHAPES
        for transposed in (False, True)
    ]
    for _ in range(2):
        turned = call_of(SHAPES[2], torch.float16)
        turned = {name: value.t().contiguous().t() for name, value in turned.items()}
        calls.append({**turned, "piece_tokens": 64})
    found = call_interpreted("memrt.kernels._triton.gradient_products:launch", calls)
    for call, left in zip(calls, found, strict=True):
        del call["piece_tokens"]
        assert float((left["total"].double() - truth_of(call)).norm()) <= limit_of(call)
        assert torch.equal(left["a"], call["a"])
    assert torch.equal(found[-1]["total"], found[-2]["total"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_compiles_for_every_architecture_without_spills(
    dtype: str, record_property: Callable[[str, object], None]
) -> None:
    """The second product, the sum a transposed view: the one that takes the most registers."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    recent = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    strides = ("left_inner_stride", "right_inner_stride", "out_column_stride")
    found = compile_ahead(
        "memrt.kernels._triton.gradient_products:product_kernel",
        {
            **{"left_ptr": f"*{dtype}", "right_ptr": "*fp32", "out_ptr": "*fp32"},
            **dict.fromkeys(("num_rows", "num_columns", "num_inner", *strides), "i32"),
        },
        {
            **dict.fromkeys(("left_row_stride", "right_column_stride", "out_row_stride"), 1),
            "NARROW": dtype == "bf16",
            "ADD": True,
            "BLOCK_ROWS": 64,
            "BLOCK_COLUMNS": 64,
            "BLOCK_INNER": 32 if dtype == "bf16" else 16,
        },
        num_warps=4,
    )
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture] // 2, resources
        # 4 warps: a multiprocessor has registers for two programs at least, and for three where
        # Triton is recent (3.6 keeps 174 a thread)
        assert resources.registers <= (168 if dtype == "bf16" and recent else 192), resources


@pytest.mark.gpu
def test_a_gpu_is_right_to_fp32_and_the_same_twice() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for dtype in DTYPES:
        for transposed in (False, True):
            call = call_of((1000, 520, 264, 72), dtype, transposed=transposed)
            results = []
            for _ in range(2):
                moved = {name: value.cuda() for name, value in call.items()}
                add_gradient_times_(**moved)
                results.append(moved["total"].cpu())
            assert torch.equal(*results)
            assert float((results[0].double() - truth_of(call)).norm()) <= limit_of(call)
