"""The FP8 AdamW step: against fp64, against itself compiled, and with gradients of NaN."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.kernels import adamw_fp8 as module
from memrt.kernels.adamw_fp8 import adamw_fp8, adamw_fp8_reference, workspace_bytes
from memrt.kernels.adamw_step import pieces
from memrt.kernels.compiled import CompiledFunction
from memrt.kernels.expanded_fp8 import num_groups
from memrt.kernels.stochastic_rounding import random_bits_reference, stochastic_round_reference
from tests.kernels.adamw_fp8_cases import (
    KEY,
    SETTINGS,
    call_of,
    copy_of,
    gradient_of,
    moments,
    new_state,
    trained,
)
from tests.kernels.allocated_bytes import allocated_peak
from tests.kernels.live_bytes import LiveBytes

SIZES = [1, 67, 127, 128, 129, 5001]
STATE = list(new_state(1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact_step(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter and moments after a step in fp64, from the moments that the state stands for."""
    s, t = SETTINGS, int(arguments["step"])
    p, g = arguments["parameter"].double().flatten(), arguments["gradient"].double().flatten()
    m, v = (moment.double() for moment in moments(arguments))
    p = p * (1 - s["lr"] * s["weight_decay"])
    m = s["beta1"] * m + (1 - s["beta1"]) * g
    v = s["beta2"] * v + (1 - s["beta2"]) * g * g
    denominator = (v / (1 - s["beta2"] ** t)).sqrt() + s["eps"]
    return p - s["lr"] * (m / (1 - s["beta1"] ** t)) / denominator, m, v


# ---------------------------------------------------------------- against the formula


@pytest.mark.parametrize("num_elements", SIZES)
def test_one_step_is_that_of_fp64(num_elements: int) -> None:
    arguments = call_of(num_elements, dtype=torch.float32)
    expected, m, v = exact_step(arguments)
    adamw_fp8(**arguments)
    # |update| <= lr / sqrt(1 - beta2) = 0.1 at most; a few fp32 roundings of it and of p
    torch.testing.assert_close(
        arguments["parameter"].double(), expected, rtol=4 * 2**-24, atol=8 * 2**-24 * 0.1
    )
    for found, truth, power in zip(
        moments(arguments),
        (m, v),
        (arguments["exp_avg_power"], arguments["exp_avg_sq_power"]),
        strict=True,
    ):
        k = (power.double() / 16).repeat_interleave(128)[:num_elements]
        # half a step of E4M3 where it is coarsest, at two steps above zero, over k
        assert ((found / truth).log().abs() <= torch.tensor(1.25).log() / k + 1e-5).all()


def test_the_reference_is_the_operator() -> None:
    for key in (None, KEY):
        ours = call_of(5001, dtype=torch.bfloat16, key=key)
        theirs = copy_of(ours)
        adamw_fp8(**ours)
        adamw_fp8_reference(**theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ("parameter", *STATE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    arguments = call_of(5001, dtype=dtype)
    widened = copy_of({**arguments, "parameter": arguments["parameter"].float()})
    adamw_fp8(**arguments)
    adamw_fp8(**widened)
    assert torch.equal(arguments["parameter"], widened["parameter"].to(dtype))
    assert all(torch.equal(arguments[name], widened[name]) for name in STATE)


def test_bf16_is_rounded_stochastically_with_a_key() -> None:
    """By the bits of `stochastic_rounding`, for element and step."""
    arguments = call_of(5001, dtype=torch.bfloat16, key=KEY)
    widened = copy_of({**arguments, "parameter": arguments["parameter"].float()})
    adamw_fp8(**arguments)
    adamw_fp8(**widened)
    bits = random_bits_reference(torch.arange(5001), torch.tensor(KEY), torch.tensor(4))
    expected = stochastic_round_reference(widened["parameter"], bits)
    assert torch.equal(arguments["parameter"], expected)
    assert not torch.equal(arguments["parameter"], widened["parameter"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    values, slopes = torch.randn(67, 5).to(dtype), torch.randn(67, 5).to(dtype)
    results = []
    for parameter, gradient in [
        (values.clone(), slopes.clone()),
        (values.t().contiguous().t(), slopes.clone()),
        (values.clone(), slopes.t().contiguous().t()),
        (values.repeat_interleave(2, dim=1)[:, ::2], slopes.repeat_interleave(3, dim=1)[:, ::3]),
    ]:
        state = new_state(335)
        step = torch.tensor(1.0)
        adamw_fp8(parameter, gradient, **state, step=step, **SETTINGS, rounding_key=KEY)
        results.append((parameter.contiguous(), *state.values()))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = call_of(5001, dtype=torch.bfloat16, key=KEY)
    pieced = copy_of(whole)
    adamw_fp8(**whole)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1024)
    adamw_fp8(**pieced)
    assert all(torch.equal(whole[name], pieced[name]) for name in ("parameter", *STATE))


def test_empty_parameter() -> None:
    parameter = torch.zeros(0, 4)
    adamw_fp8(parameter, parameter.clone(), **new_state(0), step=torch.tensor(1.0), **SETTINGS)
    assert parameter.shape == (0, 4)


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_compiled_pieces_have_the_same_codes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pieces compiled, the rest eager. Where there is no C++ compiler this must not pass."""
    eager = call_of(2**14 + 67, dtype=dtype, key=KEY)
    compiled = copy_of(eager)
    adamw_fp8(**eager)
    function = CompiledFunction(module._step_piece)
    monkeypatch.setattr(module, "_compiled_piece", function)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 2**12)  # the largest are four times as long
    monkeypatch.setattr(module, "COMPILED_FROM_ELEMENTS", 1)
    adamw_fp8(**compiled)
    assert function._compiled is not None
    assert not function.fell_back
    assert all(torch.equal(eager[name], compiled[name]) for name in STATE)
    ulp = 2**-8 if dtype is torch.bfloat16 else 4 * 2**-24
    torch.testing.assert_close(compiled["parameter"], eager["parameter"], rtol=ulp, atol=1e-8)
    peak = allocated_peak(lambda: adamw_fp8(**compiled))
    whole = copy_of(compiled)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 0)  # so that the compiled pieces' bound counts
    assert 2**14 * 16 < peak <= workspace_bytes(**whole) + 2**12, "a tail and some numbers beside"


def test_more_combinations_are_compiled_than_the_compiler_allows() -> None:
    import torch._dynamo as dynamo

    def double(x: Tensor) -> None:
        x.mul_(2)

    function = CompiledFunction(double)
    with dynamo.config.patch(recompile_limit=2):
        for size in range(2, 6):
            x = torch.ones(size)
            assert function(x)
            assert x.eq(2).all()
        assert dynamo.config.recompile_limit == 2


def test_what_cannot_be_compiled_any_more_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def triple(x: Tensor) -> None:
        x.mul_(3)

    function = CompiledFunction(triple)
    monkeypatch.setattr("memrt.kernels.compiled.MAX_COMPILED", 1)
    assert function(torch.ones(2))
    x = torch.ones(3)
    with pytest.warns(RuntimeWarning, match="triple runs uncompiled"):
        assert not function(x)
    assert x.eq(1).all()


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    eager = call_of(2**13, dtype=torch.float32)
    fallen = copy_of(eager)
    adamw_fp8(**eager)

    def no_compiler(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> None:
            raise InvalidCxxCompiler

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    function = CompiledFunction(module._step_piece)
    monkeypatch.setattr(module, "_compiled_piece", function)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 2**11)
    monkeypatch.setattr(module, "COMPILED_FROM_ELEMENTS", 1)
    with pytest.warns(RuntimeWarning, match="runs uncompiled"):
        adamw_fp8(**fallen)
    assert function.fell_back
    assert all(torch.equal(eager[name], fallen[name]) for name in ("parameter", *STATE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamw_fp8(**fallen)


def test_fake_tensors_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", forbidden)
    n = 2 * module.COMPILED_FROM_ELEMENTS
    with FakeTensorMode():
        adamw_fp8(torch.zeros(n), torch.zeros(n), **new_state(n), step=torch.zeros(()), **SETTINGS)


# ---------------------------------------------------------------- behaviour over steps


def test_a_gradient_that_is_not_finite_poisons_nothing() -> None:
    """Its elements stay as they were, with their moments; their neighbours are stepped."""
    broken = call_of(300, dtype=torch.float32, broken=True)
    sound = copy_of(broken)
    hurt = ~broken["gradient"].isfinite()
    before = broken["parameter"].clone()
    sound["gradient"] = torch.where(hurt, 0.0, sound["gradient"])
    m_before, _ = moments(broken)
    adamw_fp8(**broken)
    adamw_fp8(**sound)
    assert hurt.sum() == 2
    assert torch.equal(broken["parameter"][hurt], before[hurt])
    assert torch.equal(broken["parameter"][~hurt], sound["parameter"][~hurt])
    m, v = moments(broken)
    assert m.isfinite().all()
    assert v.isfinite().all()
    assert ((m[hurt] - m_before[hurt]).abs() <= 0.1 * m_before[hurt].abs()).all()


def test_a_huge_gradient_poisons_nothing() -> None:
    """Its square is infinite in fp32."""
    arguments = call_of(128, dtype=torch.float32)
    arguments["gradient"][3] = 3e25
    adamw_fp8(**arguments)
    m, v = moments(arguments)
    assert m.isfinite().all()
    assert v.isfinite().all()
    assert arguments["parameter"].isfinite().all()


def test_five_hundred_zero_gradients_do_not_drift() -> None:
    """Moments decay exactly as in fp32, but for the first rounding; codes stand still."""
    parameter, state = trained(5001, num_steps=20)
    zero = torch.zeros(5001)
    for step in range(21, 521):
        adamw_fp8(parameter, zero, **state, step=torch.tensor(float(step)), **SETTINGS)
        if step == 25:
            codes, (_, start) = state["exp_avg_sq_codes"].clone(), moments(state)
        if step == 120:
            resting = parameter.clone()
    assert torch.equal(state["exp_avg_sq_codes"], codes)
    _, end = moments(state)
    torch.testing.assert_close(end, start * SETTINGS["beta2"] ** 495, rtol=500 * 2**-23, atol=0)
    # m is 0.9^100 of what it was, 2.7e-5: from then on the parameter does nothing but decay
    decay = (1 - SETTINGS["lr"] * SETTINGS["weight_decay"]) ** 400
    torch.testing.assert_close(parameter, resting * decay, rtol=400 * 2**-24, atol=1e-4)


def test_a_second_moment_is_never_zero_under_a_gradient() -> None:
    """A small gradient in a group of large ones, then none: the next step stays bounded."""
    gradient = torch.ones(128)
    gradient[7] = 1e-6
    parameter, state = torch.zeros(128), new_state(128)
    settings = {**SETTINGS, "weight_decay": 0.0}
    for step, slope in ((1, gradient), (2, torch.zeros(128))):
        before = parameter.clone()
        adamw_fp8(parameter, slope, **state, step=torch.tensor(float(step)), **settings)
    assert (parameter - before).abs().max() < 2 * settings["lr"]
    assert (state["exp_avg_sq_codes"] & 127).min() >= 1


def test_the_total_update_stays_near_that_of_fp32_adamw() -> None:
    """Six steps of log-normal gradients: plain E4M3 without expansion is off by 18 %."""
    n = 2**15
    parameter, state = torch.zeros(n), new_state(n)
    exact = torch.nn.Parameter(torch.zeros(n))
    optimizer = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    settings = {**SETTINGS, "weight_decay": 0.0}
    for step in range(1, 7):
        exact.grad = gradient_of(n, step)
        optimizer.step()
        adamw_fp8(parameter, exact.grad, **state, step=torch.tensor(float(step)), **settings)
    assert (parameter - exact.detach()).norm() < 0.03 * exact.detach().norm()


# ---------------------------------------------------------------- the operator itself


def samples() -> list[dict[str, Any]]:
    cases = []
    for shape in [(1,), (67,), (16, 16), (129,), (0,), (3, 1667)]:
        cases.append((torch.randn(shape), torch.randn(shape), None))
    cases.append((torch.randn(7, 67).t(), torch.randn(67, 14)[:, ::2], None))
    cases.append((torch.randn(9001).bfloat16(), torch.randn(9001).bfloat16(), KEY))
    return [
        {
            "parameter": p,
            "gradient": g,
            **new_state(p.numel()),
            "step": torch.tensor(1.0),
            **SETTINGS,
            "rounding_key": key,
        }
        for p, g, key in cases
    ]


@pytest.mark.parametrize("index", range(8))
def test_opcheck(index: int) -> None:
    torch.library.opcheck(adamw_fp8, (), samples()[index])


@pytest.mark.parametrize("sample", [1, 2, 5, 6, 7])
def test_workspace_bounds_what_the_body_allocates(
    sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 4096)
    arguments = samples()[sample]
    known = [argument for argument in arguments.values() if isinstance(argument, Tensor)]
    with torch.no_grad(), LiveBytes(known) as seen:
        adamw_fp8._init_fn(**arguments)
    declared = workspace_bytes(**arguments)
    tail = 4 * num_groups(min(arguments["parameter"].numel(), 4096))  # some [groups] are alive too
    assert seen.peak_bytes <= declared + 4 * tail
    assert declared <= 1.5 * seen.peak_bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient": torch.zeros(2, 300)}, "gradient has shape"),
        ({"parameter": torch.zeros(600, dtype=torch.float64)}, "parameter is torch.float64"),
        ({"exp_avg_codes": torch.zeros(599, dtype=torch.uint8)}, "exp_avg_codes must be 600"),
        ({"exp_avg_sq_codes": torch.zeros(600)}, "exp_avg_sq_codes must be"),
        ({"exp_avg_largest": torch.zeros(4)}, "exp_avg_largest must be 5"),
        ({"exp_avg_sq_power": torch.zeros(5)}, "exp_avg_sq_power must be 5 .*uint8"),
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
        adamw_fp8(**arguments, step=torch.tensor(1.0), **SETTINGS)


def test_importing_the_module_imports_neither_triton_nor_the_compiler() -> None:
    code = (
        "import sys, memrt.kernels.adamw_fp8; "
        "sys.exit('triton' in sys.modules or 'torch._inductor.codegen' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("num_elements", [1, 700, 2048, 2100, 2**13, 2**14 + 3 * 1024 + 389])
def test_pieces_cover_a_parameter_once_and_begin_with_a_group(num_elements: int) -> None:
    cut = list(pieces(num_elements, whole=2048, compiled_from=2048))
    assert [start for start, _, _ in cut] == [0, *(stop for _, stop, _ in cut[:-1])]
    assert cut[-1][1] == num_elements
    assert all(start % module.GROUP_SIZE == 0 for start, _, _ in cut)
    compiled = {stop - start for start, stop, compiled in cut if compiled}
    assert compiled <= {8192, 1024, 128}
    assert bool(compiled) is (num_elements >= 2048)
    rest = sum(stop - start for start, stop, compiled in cut if not compiled)
    assert num_elements < 2048 or rest < 128


def test_what_falls_back_is_cut_into_eager_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(2**13 + 1024 + 5, dtype=torch.float32)
    sizes: list[int] = []

    class Refuses:
        def __call__(self, *_: Any) -> bool:
            return False

    def step(parameter: Tensor, *_: Any) -> None:
        sizes.append(parameter.numel())

    monkeypatch.setattr(module, "_compiled_piece", Refuses())
    monkeypatch.setattr(module, "_step_piece", step)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 2048)
    monkeypatch.setattr(module, "COMPILED_FROM_ELEMENTS", 1)
    adamw_fp8(**call)
    assert sizes == [2048, 2048, 2048, 2048, 1024, 5]
