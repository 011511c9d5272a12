"""The 4-bit AdamW step: its codes, against fp64, compiled, in Triton, and over zero gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels import adamw_int4 as module
from memrt.kernels.adamw_int4 import (
    adamw_int4,
    adamw_int4_reference,
    num_code_bytes,
    workspace_bytes,
)
from memrt.kernels.adamw_step import in_groups, num_groups
from memrt.kernels.blockwise_int4 import (
    LARGEST,
    MAP,
    SMALLEST,
    dequantize_dynamic_reference,
    dequantize_square_reference,
    packed,
    quantize_dynamic_reference,
    quantize_square_reference,
    unpacked,
)
from memrt.kernels.compiled import CompiledFunction
from tests.kernels.adamw_fp8_cases import KEY, SETTINGS, copy_of, gradient_of
from tests.kernels.allocated_bytes import allocated_peak
from tests.kernels.aot import SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.live_bytes import LiveBytes

ROOTS = torch.arange(1, 17).double() / 16
STATE = ("exp_avg_codes", "exp_avg_sq_codes", "exp_avg_scales", "exp_avg_sq_scales")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def new_state(n: int) -> dict[str, Tensor]:
    return {
        "exp_avg_codes": torch.zeros(num_code_bytes(n), dtype=torch.uint8),
        "exp_avg_sq_codes": torch.zeros(num_code_bytes(n), dtype=torch.uint8),
        "exp_avg_scales": torch.zeros(num_groups(n)),
        "exp_avg_sq_scales": torch.zeros(num_groups(n)),
    }


def moments(state: dict[str, Any], n: int) -> tuple[Tensor, Tensor]:
    codes = [in_groups(unpacked(state[name])) for name in STATE[:2]]
    m = dequantize_dynamic_reference(codes[0], state["exp_avg_scales"])
    v = dequantize_square_reference(codes[1], state["exp_avg_sq_scales"])
    return m.flatten()[:n], v.flatten()[:n]


def call_of(
    n: int, *, dtype: torch.dtype, key: list[int] | None = None, broken: bool = False
) -> dict[str, Any]:
    """The arguments of a fourth step; `broken`: its gradient has a NaN and an infinity."""
    parameter = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    state = new_state(n)
    for step in range(1, 4):
        gradient = gradient_of(n, step).to(dtype)
        adamw_int4(parameter, gradient, **state, step=torch.tensor(float(step)), **SETTINGS)
    gradient = gradient_of(n, 9).to(dtype)
    if broken:
        gradient[0], gradient[n // 2] = torch.inf, torch.nan
    step = torch.tensor(4.0)
    return {
        "parameter": parameter,
        "gradient": gradient,
        **state,
        "step": step,
        **SETTINGS,
        "rounding_key": key,
    }


# ---------------------------------------------------------------- codes


def test_the_map_is_the_published_one() -> None:
    """bitsandbytes makes it of 3 exponent bits and 4 in all."""
    from bitsandbytes.functional import create_dynamic_map

    published = create_dynamic_map(signed=True, max_exponent_bits=3, total_bits=4)
    kept = published.unique()  # theirs fills up to 256 with zeros
    torch.testing.assert_close(torch.tensor(MAP), kept, rtol=2**-22, atol=0)


@pytest.mark.parametrize(
    ("quantize", "values"),
    [(quantize_dynamic_reference, torch.tensor(MAP).double()), (quantize_square_reference, ROOTS)],
)
def test_codes_are_the_nearest(quantize: Callable[..., Any], values: Tensor) -> None:
    x = torch.randn(64, 128) * torch.exp(torch.randn(64, 1))
    x = x.square() if quantize is quantize_square_reference else x
    codes, scale = quantize(x)
    ratio = x.double() / scale.double()[:, None]
    ratio = ratio.sqrt() if quantize is quantize_square_reference else ratio
    distance = ratio.unsqueeze(-1) - values
    chosen = distance.abs().gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert (chosen - distance.abs().amin(dim=-1)).max() < 2**-22
    assert torch.equal(scale.abs(), x.abs().amax(dim=1))


def test_the_largest_is_kept_exactly_whatever_its_sign() -> None:
    """The map has 1 and not -1: published, a block with a negative one shrinks at every step."""
    x = torch.full((2, 128), 0.1)
    x[0, 5], x[1, 5] = -3.0, 3.0
    for _ in range(3):
        codes, scale = quantize_dynamic_reference(x)
        x = dequantize_dynamic_reference(codes, scale)
    assert x[0, 5] == -3.0
    assert x[1, 5] == 3.0


def test_edges_of_the_codes() -> None:
    zero = torch.zeros(1, 128)
    assert not dequantize_dynamic_reference(*quantize_dynamic_reference(zero)).any()
    assert not dequantize_square_reference(*quantize_square_reference(zero)).any()
    tiny = zero.clone()
    tiny[0, 0] = 2.0**-140
    assert dequantize_square_reference(*quantize_square_reference(tiny))[0, 0] == SMALLEST
    huge = zero + torch.inf
    assert dequantize_square_reference(*quantize_square_reference(huge))[0, 0] == LARGEST
    spread = torch.full((1, 128), 1e-20)
    spread[0, 0] = 1.0
    assert dequantize_square_reference(*quantize_square_reference(spread)).min() == 1 / 256
    codes = torch.randint(0, 16, (256,), dtype=torch.int32)
    assert torch.equal(unpacked(packed(codes)), codes)
    assert packed(torch.tensor([1, 15], dtype=torch.int32)).tolist() == [0xF1]


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("n", [1, 67, 127, 128, 129, 5001])
def test_one_step_is_that_of_fp64(n: int) -> None:
    arguments = call_of(n, dtype=torch.float32)
    s = SETTINGS
    m, v = (moment.double() for moment in moments(arguments, n))
    g = arguments["gradient"].double()
    m = s["beta1"] * m + (1 - s["beta1"]) * g
    v = s["beta2"] * v + (1 - s["beta2"]) * g * g
    p = arguments["parameter"].double() * (1 - s["lr"] * s["weight_decay"])
    p -= s["lr"] * (m / (1 - s["beta1"] ** 4)) / ((v / (1 - s["beta2"] ** 4)).sqrt() + s["eps"])
    adamw_int4(**arguments)
    torch.testing.assert_close(
        arguments["parameter"].double(), p, rtol=4 * 2**-24, atol=8 * 2**-24 * 0.1
    )
    found_m, found_v = moments(arguments, n)
    scale = in_groups(m.float()).abs().amax(dim=1).repeat_interleave(128)[:n]
    # half of the map's widest gap, from -1 that it lacks to -0.8875 a whole one
    assert ((found_m - m).abs() <= 0.1126 * scale).all()
    scale = in_groups(v.float()).amax(dim=1).repeat_interleave(128)[:n]
    assert ((found_v.sqrt() - v.sqrt()).abs() <= (1 / 16 + 1e-6) * scale.sqrt()).all()
    assert (found_v > 0).all()


def test_reference_pieces_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = call_of(5001, dtype=torch.bfloat16, key=KEY)
    pieced, reference, turned = copy_of(whole), copy_of(whole), copy_of(whole)
    adamw_int4(**whole)
    adamw_int4_reference(**reference)
    turned["parameter"] = turned["parameter"].repeat_interleave(2)[::2]
    adamw_int4(**turned)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1024)
    adamw_int4(**pieced)
    for other in (pieced, reference, turned):
        assert all(torch.equal(whole[name], other[name]) for name in ("parameter", *STATE))


@pytest.mark.slow
def test_compiled_pieces_have_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = call_of(2**14 + 67, dtype=torch.float32)
    compiled = copy_of(eager)
    adamw_int4(**eager)
    function = CompiledFunction(module._step_piece)
    monkeypatch.setattr(module, "_compiled_piece", function)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 2**12)
    monkeypatch.setattr(module, "COMPILED_FROM_ELEMENTS", 1)
    adamw_int4(**compiled)
    assert function._compiled is not None
    assert not function.fell_back
    assert all(torch.equal(eager[name], compiled[name]) for name in STATE)
    torch.testing.assert_close(
        compiled["parameter"], eager["parameter"], rtol=4 * 2**-24, atol=1e-8
    )
    peak = allocated_peak(lambda: adamw_int4(**compiled))
    monkeypatch.setattr(module, "SCRATCH_BYTES", 0)  # so that the compiled pieces' bound counts
    assert 2**14 * 16 < peak <= workspace_bytes(**compiled) + 2**12


def test_a_gradient_that_is_not_finite_poisons_nothing() -> None:
    broken = call_of(300, dtype=torch.float32, broken=True)
    hurt = ~broken["gradient"].isfinite()
    before = broken["parameter"].clone()
    adamw_int4(**broken)
    assert hurt.sum() == 2
    assert torch.equal(broken["parameter"][hurt], before[hurt])
    assert not torch.equal(broken["parameter"][~hurt], before[~hurt])
    assert all(moment.isfinite().all() for moment in moments(broken, 300))


def test_what_only_decays_keeps_its_codes() -> None:
    call = call_of(5001, dtype=torch.float32)
    call["gradient"].zero_()
    for step in range(4, 8):
        adamw_int4(**{**call, "step": torch.tensor(float(step))})
    settled = copy_of(call)
    for step in range(8, 108):
        adamw_int4(**{**call, "step": torch.tensor(float(step))})
    assert all(torch.equal(call[name], settled[name]) for name in STATE[:2])
    for name, beta in (("exp_avg_scales", 0.9), ("exp_avg_sq_scales", 0.99)):
        torch.testing.assert_close(call[name], settled[name] * beta**100, rtol=1e-4, atol=0)


# ---------------------------------------------------------------- the operator


@pytest.mark.parametrize("shape", [(1,), (67,), (16, 16), (0,), (3, 1667)])
def test_opcheck_and_workspace(shape: tuple[int, ...]) -> None:
    n = torch.Size(shape).numel()
    arguments = {
        "parameter": torch.randn(shape),
        "gradient": torch.randn(shape),
        **new_state(n),
        "step": torch.tensor(1.0),
        **SETTINGS,
        "rounding_key": KEY,
    }
    torch.library.opcheck(adamw_int4, (), copy_of(arguments))
    known = [argument for argument in arguments.values() if isinstance(argument, Tensor)]
    with torch.no_grad(), LiveBytes(known) as seen:
        adamw_int4._init_fn(**arguments)
    assert seen.peak_bytes <= workspace_bytes(**arguments) + 256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient": torch.zeros(2, 300)}, "gradient has shape"),
        ({"exp_avg_codes": torch.zeros(600, dtype=torch.uint8)}, "exp_avg_codes must be 300"),
        ({"exp_avg_sq_scales": torch.zeros(4)}, "exp_avg_sq_scales must be 5"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Tensor], words: str) -> None:
    arguments: dict[str, Any] = {
        "parameter": torch.zeros(600),
        "gradient": torch.zeros(600),
        **new_state(600),
        **change,
    }
    with pytest.raises(ValueError, match=words):
        adamw_int4(**arguments, step=torch.tensor(1.0), **SETTINGS)


# ---------------------------------------------------------------- Triton


def test_the_interpreted_kernel_has_the_codes_of_the_reference() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    calls = [
        call_of(5001, dtype=torch.float32),
        call_of(300, dtype=torch.float32, broken=True),
        call_of(1, dtype=torch.float16),
        call_of(3001, dtype=torch.bfloat16, key=KEY),
        {**call_of(67, dtype=torch.float32), **new_state(67), "step": torch.tensor(1.0)},
    ]
    interpreted = call_interpreted("memrt.kernels.adamw_int4:adamw_int4", calls)
    for before, found in zip(calls, interpreted, strict=True):
        expected = copy_of(before)
        adamw_int4(**expected)
        assert not torch.equal(expected["parameter"], before["parameter"])
        for name in STATE:
            assert torch.equal(found[name], expected[name]), name
        narrow = found["parameter"].dtype
        ulp = 4 * 2**-24 if narrow is torch.float32 else torch.finfo(narrow).eps
        torch.testing.assert_close(
            found["parameter"], expected["parameter"], rtol=ulp, atol=8 * 2**-24 * 0.1
        )


def test_it_compiles_for_every_architecture_without_spills(
    record_property: Callable[[str, object], None],
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    scalars = ("decay", "step_size", "beta1", "rest1", "beta2", "rest2", "correction", "eps")
    found = compile_ahead(
        "memrt.kernels._triton.adamw_int4:adamw_int4_kernel",
        {
            **dict.fromkeys(("p_ptr", "g_ptr"), "*bf16"),
            **dict.fromkeys(("m_data_ptr", "v_data_ptr"), "*u8"),
            **dict.fromkeys(("m_scales_ptr", "v_scales_ptr"), "*fp32"),
            "num_elements": "i32",
            **dict.fromkeys(scalars, "fp32"),
            **dict.fromkeys(("key0", "key1", "step"), "i32"),
        },
        {"STOCHASTIC": True, "GROUP_SIZE": 128, "BLOCKS": 8},
        num_warps=4,
        enable_fp_fusion=False,
    )
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.registers <= 128, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture], resources


@pytest.mark.gpu
def test_a_gpu_has_the_codes_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for dtype, key in ((torch.float32, None), (torch.bfloat16, KEY), (torch.float16, None)):
        call = call_of(2**16 + 67, dtype=dtype, key=key)
        expected = copy_of(call)
        moved = {
            name: value.cuda() if isinstance(value, Tensor) and name != "step" else value
            for name, value in call.items()
        }
        adamw_int4(**moved)
        adamw_int4(**expected)
        for name in STATE:
            assert torch.equal(moved[name].cpu(), expected[name]), name
