"""AdaLomo's operator against its formula in fp64: in pieces, in bytes, and in Triton's tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memrt.kernels import adalomo as module
from memrt.kernels.adalomo import adalomo_reference, tiles_of, workspace_bytes
from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.kernels.stochastic_rounding import workspace_bytes as rounding_bytes
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.live_bytes import LiveBytes

# 8 warps of 64 registers a thread leave room for 4 programs on a multiprocessor
MAX_REGISTERS = 64
SHAPES: list[tuple[int, ...]] = [(67, 600), (300, 5), (1, 1100), (1, 1), (700,), (5, 3, 7), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def call_of(
    shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """A step from a second moment that has seen something; gradients differ by row and column."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = shape[0] if len(shape) > 1 else 1
    size = torch.Size(shape).numel()
    row = torch.rand(num_rows, generator=generator) + 0.1
    column = torch.rand(size // num_rows, generator=generator) + 0.1
    gradient = torch.randn(num_rows, size // num_rows, generator=generator)
    gradient *= torch.outer(row, column) * 30
    weight = torch.randn(shape, generator=generator)
    return {
        "parameter": weight.to(device, dtype),
        "gradient": gradient.view(shape).to(device, dtype),
        "row": row.to(device) if len(shape) > 1 else None,
        "column": column.to(device) if len(shape) > 1 else column.view(shape).to(device),
        "fresh": torch.tensor(0.3, device=device),
        "lr": 0.05,
        "weight_decay": 0.1,
        "eps_square": 1e-30,
        "eps_weight": 1e-3,
        "clip_threshold": 0.8,
    }


def copy_of(call: dict[str, Any]) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in call.items()}


def formula(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference with all numbers of this dtype, as matrices."""
    shape = module._shape_of(call["parameter"])
    moved = {
        "parameter": call["parameter"].reshape(shape).to("cpu", dtype, copy=True),
        "gradient": call["gradient"].reshape(shape).to("cpu", dtype),
        "row": None if call["row"] is None else call["row"].to("cpu", dtype, copy=True),
        "column": call["column"].reshape(-1).to("cpu", dtype, copy=True),
        "fresh": call["fresh"].to("cpu", dtype),
    }
    numbers = {name: call[name] for name in ("lr", "weight_decay", "clip_threshold")}
    adalomo_reference(**moved, **numbers, eps=(call["eps_square"], call["eps_weight"]))
    return moved


def check(found: dict[str, Any], call: dict[str, Any]) -> None:
    """As close to fp64 as the reference is in fp32, and one rounding of the weight."""
    truth, plain = formula(call, torch.float64), formula(call, torch.float32)
    eps = torch.finfo(call["parameter"].dtype).eps
    for name in ("parameter", "row", "column"):
        if truth[name] is None:
            continue
        exact = truth[name].flatten()
        error = (found[name].cpu().double().flatten() - exact).abs().max()
        limit = (
            2 * (plain[name].double().flatten() - exact).abs().max()
            + 8 * 2**-24 * exact.abs().max()
        )
        if name == "parameter":
            limit += eps / 2 * exact.abs().max()
        assert float(error) <= float(limit), name
    assert not torch.equal(found["parameter"].cpu(), call["parameter"].cpu())


@pytest.mark.parametrize("piece", [2**18, 64], ids=["whole", "pieces"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_its_formula(dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", piece)
    for shape in SHAPES:
        call = call_of(shape, dtype)
        found = copy_of(call)
        module._adalomo(**found)
        check(found, call)


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=str,
)
def test_compiled_pieces_make_the_same_step(
    dtype: torch.dtype, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pieces compiled, the rest eager. Where there is no C++ compiler this must not pass.

    Sums come in another order; a step that is off by its roundings may round the weight elsewhere.
    """
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1024)
    call = call_of((40, 64), dtype)
    if rounded:
        call |= {"step": STEP, "rounding_key": KEY}
    eager, compiled = copy_of(call), copy_of(call)
    module._adalomo(**eager)
    monkeypatch.setattr(module, "COMPILED_FROM_ELEMENTS", 2048)
    ran = []
    for name in ("_compiled_sums", "_compiled_squares", "_compiled_write"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function: ran.append(f) or f(*a))
    module._adalomo(**compiled)
    assert len(ran) == 3 * 2
    assert not any(function.fell_back for function in ran)
    for name in ("row", "column"):
        torch.testing.assert_close(compiled[name], eager[name], rtol=2e-6, atol=0)
    ulp = torch.finfo(dtype).eps if not rounded else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        compiled["parameter"].float(), eager["parameter"].float(), rtol=2 * ulp, atol=1e-7
    )
    if not rounded:
        check(compiled, call)


def strided(call: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, with parameter and gradient laid out the other way round."""
    turned = copy_of(call)
    for name in ("parameter", "gradient"):
        turned[name] = call[name].transpose(0, -1).contiguous().transpose(0, -1)
        assert not turned[name].is_contiguous()
    return turned


@pytest.mark.parametrize("shape", [(40, 60), (5, 3, 7)])
def test_strides_do_not_matter(shape: tuple[int, ...]) -> None:
    call = call_of(shape, torch.float32)
    turned = strided(call)
    module._adalomo(**turned)
    check(turned, call)


def test_opcheck() -> None:
    for shape in ((3, 5), (4,), (0, 3)):
        call = call_of(shape, torch.bfloat16) if 0 not in shape else empty()
        torch.library.opcheck(torch.ops.memrt.adalomo.default, (), call)


STEP, KEY = torch.tensor(3.0), [123456789, 987654321]


def rounded_calls() -> list[dict[str, Any]]:
    """Each step twice: of the weight in fp32, and of the same weight in bf16."""
    found = []
    for call in (
        call_of((67, 600), torch.bfloat16),
        call_of((5, 3, 7), torch.bfloat16),
        call_of((700,), torch.bfloat16),
        strided(call_of((40, 60), torch.bfloat16)),
        strided(call_of((5, 3, 7), torch.bfloat16)),
    ):
        found.append({**copy_of(call), "parameter": call["parameter"].float()})
        found.append({**copy_of(call), "step": STEP, "rounding_key": KEY})
    return found


def check_rounded(left: list[dict[str, Any]]) -> None:
    """bf16 is the fp32 result, rounded by what rounds everywhere else."""
    for exact, rounded in zip(left[::2], left[1::2], strict=True):
        expected = torch.empty(exact["parameter"].shape, dtype=torch.bfloat16)
        rounding = Rounding((KEY[0], KEY[1]), STEP)
        stochastic_copy_(expected, exact["parameter"].contiguous(), rounding=rounding)
        assert torch.equal(rounded["parameter"], expected)
        assert not torch.equal(expected, exact["parameter"].bfloat16())
        for name in ("row", "column"):
            assert exact[name] is None or torch.equal(exact[name], rounded[name])


@pytest.mark.parametrize("piece", [2**18, 64], ids=["whole", "pieces"])
def test_bf16_is_rounded_stochastically_and_once(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", piece)
    calls = rounded_calls()
    for call in calls:
        module._adalomo(**call)
    check_rounded(calls)
    torch.library.opcheck(torch.ops.memrt.adalomo.default, (), rounded_calls()[1])


def test_workspace_counts_what_rounding_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch inside the operator that rounds is not seen; it is what that operator declares."""
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 4096)
    call = {**call_of((500, 64), torch.bfloat16), "step": STEP, "rounding_key": KEY}
    with LiveBytes([v for v in call.values() if isinstance(v, Tensor)]) as seen:
        module._adalomo._init_fn(**call)
    piece = call["parameter"][:64]
    scratch = rounding_bytes(piece, piece.float())
    declared = workspace_bytes(**call)
    assert declared == workspace_bytes(*call.values())
    assert max(seen.peak_bytes, 4 * 4096 + scratch) <= declared <= seen.peak_bytes + scratch


def empty() -> dict[str, Any]:
    call = call_of((1, 3), torch.float32)
    nothing = torch.zeros(0, 3)
    return {**call, "parameter": nothing, "gradient": nothing.clone(), "row": torch.zeros(0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_is_what_the_body_allocates(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 4096)
    for call in (
        call_of((500, 64), dtype),
        call_of((1, 4000), dtype),
        call_of((3000,), dtype),
        strided(call_of((20, 10, 15), dtype)),
    ):
        with LiveBytes([v for v in call.values() if isinstance(v, Tensor)]) as seen:
            module._adalomo._init_fn(**call)
        declared = workspace_bytes(**call)
        assert seen.peak_bytes <= declared <= 1.5 * seen.peak_bytes


def test_on_cuda_temporaries_do_not_grow_with_the_weight() -> None:
    with FakeTensorMode():
        for rows, columns in ((4096, 11008), (128256, 4096), (4096, 65536), (1, 10**6)):
            weight = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
            declared = workspace_bytes(weight, weight)
            blocks = max(32, columns / 2048 + 1)
            assert declared <= 4 * (129 * columns + (blocks + 1) * rows + 256 * blocks) + 32
    assert declared <= 16 * 10**6  # a vector: as much as it weighs in fp32, and its partial sums


class NoHostRead(TorchDispatchMode):
    """Refuses what waits for a device to know a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._opname not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"), func
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host() -> None:
    call = call_of((40, 30), torch.bfloat16)
    with NoHostRead():
        module._adalomo._init_fn(**call)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(call["fresh"])


def test_what_is_wrong_is_named() -> None:
    call = call_of((4, 6), torch.float32)
    for options, words in (
        ({"parameter": torch.zeros(4, 6).double()}, r"parameter is torch\.float64; adalomo takes"),
        ({"gradient": torch.zeros(6, 4)}, r"gradient has shape \(6, 4\), the parameter \(4, 6\)"),
        ({"row": torch.zeros(6)}, "row must be 4 elements of fp32, got 6"),
        ({"column": torch.zeros(6).half()}, r"column must be 6 .* got 6 of torch\.float16"),
        ({"row": None}, "a parameter of 4 rows has a second moment by row"),
        ({"step": STEP, "rounding_key": KEY}, r"to bf16 and wants a step, got torch\.float32"),
    ):
        with pytest.raises(ValueError, match=words):
            module._adalomo(**{**call, **options})


# ---------------------------------------------------------------- Triton


def test_the_interpreted_kernels_are_as_close_to_fp64_as_the_reference() -> None:
    """One strip and several, one block of columns and several, ragged; all layouts."""
    pytest.importorskip("triton", reason="Triton is not installed")
    assert tiles_of(67, 600)[0] > 1
    assert tiles_of(300, 5)[2] == 8
    calls = [call_of(shape, torch.float32) for shape in SHAPES]
    calls += [call_of((17, 530), dtype) for dtype in DTYPES[1:]]
    calls += [strided(call_of(shape, torch.bfloat16)) for shape in ((40, 60), (5, 3, 7))]
    for call in calls:
        call["bytes_found"] = torch.zeros(2)
    found = call_interpreted("tests.kernels.test_adalomo:counted", calls)
    for call, left in zip(calls, found, strict=True):
        check(left, call)
        seen, declared = left["bytes_found"].tolist()
        assert seen <= declared <= 1.5 * seen + 64


def test_the_interpreted_kernel_rounds_with_the_bits_of_all_others() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    check_rounded(call_interpreted("tests.kernels.test_adalomo:stepped", rounded_calls()))


def stepped(**call: Any) -> None:
    """What the interpreter's process calls: the operator's body alone."""
    module._adalomo._init_fn(**call)


def counted(bytes_found: Tensor, **call: Any) -> None:
    """What the interpreter's process calls: the operator's body, and the bytes that it takes."""
    with LiveBytes([v for v in call.values() if isinstance(v, Tensor)]) as seen:
        module._adalomo._init_fn(**call)
    bytes_found.copy_(torch.tensor([seen.peak_bytes, workspace_bytes(**call)]))


@pytest.mark.parametrize(
    ("kernel", "block_columns"),
    [("sums", 512), ("squares", 512), ("write", 512), ("squares", 2048)],
)
def test_it_compiles_for_every_architecture_without_spills(
    kernel: str, block_columns: int, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    sizes = ("num_rows", "num_columns", "weight_row", "gradient_row", "strip", "key0", "key1")
    floats = ("row_ptr", "column_ptr", "squares_ptr", "sizes_ptr", "step_ptr", "row_sums_ptr")
    found = compile_ahead(
        f"memrt.kernels._triton.adalomo:{kernel}_kernel",
        {
            **dict.fromkeys(("weight_ptr", "gradient_ptr"), "*bf16"),
            **dict.fromkeys((*floats, "column_sums_ptr"), "*fp32"),
            **dict.fromkeys(sizes, "i32"),
            "eps": "fp32",
        },
        {
            "gradient_column": 1,
            **({} if kernel == "sums" else {"weight_column": 1, "HAS_ROWS": True}),
            **({"STOCHASTIC": True} if kernel == "write" else {}),
            "BLOCK_ROWS": 2048 // block_columns,
            "BLOCK_COLUMNS": block_columns,
        },
        num_warps=8,
        enable_fp_fusion=kernel != "write",
    )
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.registers <= MAX_REGISTERS, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture], resources


@pytest.mark.gpu
def test_a_gpu_is_as_close_to_fp64_as_the_reference() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for shape in ((1000, 3001), (5000, 700), (3000,)):
        for dtype in DTYPES:
            call = call_of(shape, dtype, device="cuda")
            found, again = copy_of(call), copy_of(call)
            module._adalomo(**found)
            module._adalomo(**again)
            check(found, call)
            assert torch.equal(found["parameter"], again["parameter"])
    calls = [
        {name: v.to("cuda") if isinstance(v, Tensor) else v for name, v in call.items()}
        for call in rounded_calls()
    ]
    for call in calls:
        module._adalomo(**call)
    check_rounded(
        [{n: v.cpu() if isinstance(v, Tensor) else v for n, v in c.items()} for c in calls]
    )
