"""The 8-bit AdamW step, against its formula, against fp64, and against bitsandbytes itself."""

from __future__ import annotations

import builtins
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels import adamw_int8 as module
from memrt.kernels import stochastic_rounding
from memrt.kernels.adamw_int8 import adamw_int8, adamw_int8_reference, workspace_bytes
from memrt.kernels.dynamic_map import (
    BLOCK_SIZE,
    dequantize_blockwise_reference,
    dynamic_map,
    num_blocks,
)
from memrt.kernels.stochastic_rounding import Rounding
from tests.kernels.live_bytes import LiveBytes

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
SIZES = [1, 67, 255, 256, 257, 5001]
TABLE_BIN = 2**-15  # the width of a bin of bitsandbytes' CPU table, in units of the block's scale
# fp32: a moment is summed from two products, so two roundings of terms no larger than the scale
MOMENT_ERROR = 4 * 2**-24


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def new_state(num_elements: int) -> dict[str, Tensor]:
    return {
        "exp_avg_codes": torch.zeros(num_elements, dtype=torch.uint8),
        "exp_avg_sq_codes": torch.zeros(num_elements, dtype=torch.uint8),
        "exp_avg_scales": torch.zeros(num_blocks(num_elements)),
        "exp_avg_sq_scales": torch.zeros(num_blocks(num_elements)),
    }


def maps() -> dict[str, Tensor]:
    return {
        "exp_avg_map": torch.tensor(dynamic_map(signed=True)),
        "exp_avg_sq_map": torch.tensor(dynamic_map(signed=False)),
    }


def moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    first, second = maps().values()
    return (
        dequantize_blockwise_reference(
            state["exp_avg_codes"].flatten(), state["exp_avg_scales"], first
        ),
        dequantize_blockwise_reference(
            state["exp_avg_sq_codes"].flatten(), state["exp_avg_sq_scales"], second
        ),
    )


def trained(num_elements: int, *, seed: int = 0, num_steps: int = 3) -> tuple[Tensor, Any]:
    """A parameter and a state that bitsandbytes' CPU kernel has written."""
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.randn(num_elements, generator=generator)
    state = new_state(num_elements)
    for step in range(1, num_steps + 1):
        gradient = torch.randn(num_elements, generator=generator) * 10.0 ** -(step % 3)
        adamw_int8(
            parameter, gradient, **state, **maps(), step=torch.tensor(float(step)), **SETTINGS
        )
    return parameter, state


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


# ---------------------------------------------------------------- against the formula


@pytest.mark.parametrize("num_elements", SIZES)
def test_one_step_follows_the_reference(num_elements: int) -> None:
    parameter, state = trained(num_elements)
    gradient = torch.randn(num_elements, generator=torch.Generator().manual_seed(9))
    expected, expected_state = parameter.clone(), copy_of(state)
    step = torch.tensor(4.0)

    adamw_int8(parameter, gradient, **state, **maps(), step=step, **SETTINGS)
    adamw_int8_reference(expected, gradient, **expected_state, **maps(), step=step, **SETTINGS)

    # |update| <= lr * 1 / sqrt(1 - beta2) = 0.1 at most; a few fp32 roundings of it and of p
    torch.testing.assert_close(parameter, expected, rtol=4 * 2**-24, atol=8 * 2**-24 * 0.1)
    for key in ("exp_avg_scales", "exp_avg_sq_scales"):
        torch.testing.assert_close(state[key], expected_state[key], rtol=4 * 2**-24, atol=0)


@pytest.mark.parametrize("num_elements", SIZES)
def test_codes_are_nearest_up_to_one_bin_of_the_cpu_table(num_elements: int) -> None:
    """The unrounded moments in fp64 are the truth; the table may miss the nearest code by a bin."""
    parameter, state = trained(num_elements)
    gradient = torch.randn(num_elements, generator=torch.Generator().manual_seed(9))
    m, v = (moment.double() for moment in moments(state))
    m = SETTINGS["beta1"] * m + (1 - SETTINGS["beta1"]) * gradient.double()
    v = SETTINGS["beta2"] * v + (1 - SETTINGS["beta2"]) * gradient.double().square()

    adamw_int8(parameter, gradient, **state, **maps(), step=torch.tensor(4.0), **SETTINGS)

    for name, truth in (("exp_avg", m), ("exp_avg_sq", v)):
        code_map = maps()[f"{name}_map"].double()
        scale = state[f"{name}_scales"].repeat_interleave(BLOCK_SIZE)[:num_elements].double()
        distance = (truth / scale)[:, None] - code_map[None]
        chosen = distance.abs().gather(1, state[f"{name}_codes"].long()[:, None])[:, 0]
        excess = chosen - distance.abs().amin(dim=1)
        assert excess.max() <= TABLE_BIN + MOMENT_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """lr * weight_decay = 1e-3 is lost in bf16 when decay is rounded on its own."""
    parameter, state = trained(5001)
    weight = parameter.to(dtype)
    gradient = torch.randn(5001).to(dtype)
    expected, expected_state = weight.float(), copy_of(state)
    step = torch.tensor(4.0)

    adamw_int8(weight, gradient, **state, **maps(), step=step, **SETTINGS)
    adamw_int8(expected, gradient.float(), **expected_state, **maps(), step=step, **SETTINGS)

    assert torch.equal(weight, expected.to(dtype))
    assert all(torch.equal(state[key], expected_state[key]) for key in state)


def test_parameter_and_gradient_may_differ_in_dtype() -> None:
    parameter, state = trained(300)
    expected, expected_state = parameter.clone(), copy_of(state)
    gradient = torch.randn(300).bfloat16()
    step = torch.tensor(4.0)
    adamw_int8(parameter, gradient, **state, **maps(), step=step, **SETTINGS)
    adamw_int8(expected, gradient.float(), **expected_state, **maps(), step=step, **SETTINGS)
    assert torch.equal(parameter, expected)


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
        state = {**new_state(335)}
        step = torch.tensor(1.0)
        adamw_int8(parameter, gradient, **state, **maps(), step=step, **SETTINGS)
        results.append((parameter.contiguous(), *state.values()))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter, state = trained(5001)
    pieced, pieced_state = parameter.bfloat16(), copy_of(state)
    parameter = parameter.bfloat16()
    gradient, step = torch.randn(5001), torch.tensor(4.0)
    adamw_int8(parameter, gradient, **state, **maps(), step=step, **SETTINGS)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1024)
    monkeypatch.setattr(module, "CPU_PIECE_ELEMENTS", 512)
    adamw_int8(pieced, gradient, **pieced_state, **maps(), step=step, **SETTINGS)
    assert torch.equal(pieced, parameter)
    assert all(torch.equal(state[key], pieced_state[key]) for key in state)


def test_empty_parameter() -> None:
    parameter = torch.zeros(0, 4)
    adamw_int8(
        parameter, parameter.clone(), **new_state(0), **maps(), step=torch.tensor(1.0), **SETTINGS
    )
    assert parameter.shape == (0, 4)


# ---------------------------------------------------------------- against bitsandbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_bitsandbytes_on_the_cpu(dtype: torch.dtype) -> None:
    """On the CPU bitsandbytes decays first, in fp32, as we do: nothing may differ."""
    from bitsandbytes.optim import AdamW8bit

    generator = torch.Generator().manual_seed(1)
    start = torch.randn(5001, generator=generator).to(dtype)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = AdamW8bit([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    ours, state = start.clone(), new_state(5001)
    for step in range(1, 11):
        gradient = torch.randn(5001, generator=generator).to(dtype)
        theirs.grad = gradient.clone()
        optimizer.step()
        adamw_int8(ours, gradient, **state, **maps(), step=torch.tensor(float(step)), **SETTINGS)
    known = optimizer.state[theirs]
    assert torch.equal(ours, theirs.detach())
    assert torch.equal(state["exp_avg_codes"], known["state1"])
    assert torch.equal(state["exp_avg_sq_codes"], known["state2"])
    assert torch.equal(state["exp_avg_scales"], known["absmax1"])
    assert torch.equal(state["exp_avg_sq_scales"], known["absmax2"])


def test_maps_are_not_changed() -> None:
    """bitsandbytes' own schema says that they may be; they are shared by all parameters."""
    shared = maps()
    state = new_state(600)
    adamw_int8(
        torch.randn(600), torch.randn(600), **state, **shared, step=torch.tensor(1.0), **SETTINGS
    )
    assert all(torch.equal(shared[key], value) for key, value in maps().items())


# ---------------------------------------------------------------- behaviour over steps


def test_five_hundred_zero_gradients_do_not_drift() -> None:
    """The second moment decays by beta2 a step, exactly as in fp32, and its codes stand still."""
    parameter, state = trained(5001, num_steps=20)
    _, start = moments(state)
    codes = state["exp_avg_sq_codes"].clone()
    zero = torch.zeros(5001)
    for step in range(21, 521):
        adamw_int8(parameter, zero, **state, **maps(), step=torch.tensor(float(step)), **SETTINGS)
        if step == 120:
            resting = parameter.clone()
    assert torch.equal(state["exp_avg_sq_codes"], codes)
    _, end = moments(state)
    torch.testing.assert_close(end, start * SETTINGS["beta2"] ** 500, rtol=500 * 2**-24, atol=0)
    # m is 0.9^100 of what it was, 2.7e-5: from then on the parameter does nothing but decay
    decay = (1 - SETTINGS["lr"] * SETTINGS["weight_decay"]) ** 400
    torch.testing.assert_close(parameter, resting * decay, rtol=400 * 2**-24, atol=1e-4)


def test_a_second_moment_below_the_smallest_code_does_not_blow_up() -> None:
    """A small gradient in a block of large ones, then none: v would be 0 under an m that is not."""
    gradient = torch.ones(BLOCK_SIZE)
    gradient[7] = 1e-4  # its v is 1e-8 of the block's scale; the smallest code is 3e-7
    parameter, state = torch.zeros(BLOCK_SIZE), new_state(BLOCK_SIZE)
    settings = {**SETTINGS, "weight_decay": 0.0}
    for step, slope in ((1, gradient), (2, torch.zeros(BLOCK_SIZE))):
        before = parameter.clone()
        adamw_int8_reference(
            parameter, slope, **state, **maps(), step=torch.tensor(float(step)), **settings
        )
    assert (parameter - before).abs().max() < 2 * settings["lr"]
    assert state["exp_avg_sq_codes"].min() >= 1


def test_it_trains_as_fp32_adamw_does() -> None:
    """Least squares: both runs end a thousand times lower, at the same weights."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(256, 64, generator=generator)
    targets = inputs @ torch.randn(64, 80, generator=generator)

    def loss_of(weight: Tensor) -> Tensor:
        return (inputs @ weight.view(64, 80) - targets).square().mean()

    exact = torch.nn.Parameter(torch.zeros(5120))
    optimizer = torch.optim.AdamW([exact], lr=3e-2, betas=(0.9, 0.99), weight_decay=0.0)
    weight, state = torch.zeros(5120), new_state(5120)
    start = loss_of(weight).item()
    settings = {**SETTINGS, "lr": 3e-2, "weight_decay": 0.0}
    for step in range(1, 201):
        optimizer.zero_grad()
        loss_of(exact).backward()
        optimizer.step()
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
        adamw_int8(weight, gradient, **state, **maps(), step=torch.tensor(float(step)), **settings)
    assert loss_of(exact).item() < 1e-3 * start
    assert loss_of(weight).item() < 1e-3 * start
    difference = (weight - exact.detach()).square().mean().sqrt().item()
    assert difference < 0.02  # the weights are N(0, 1)


def test_untouched_blocks_stay_zero() -> None:
    """No gradient ever: the moments are zero whatever their codes, and nothing moves."""
    ours, reference = new_state(300), new_state(300)
    for step, state in ((adamw_int8, ours), (adamw_int8_reference, reference)):
        parameter = torch.ones(300)
        arguments = {**SETTINGS, "weight_decay": 0.0}
        step(parameter, torch.zeros(300), **state, **maps(), step=torch.tensor(1.0), **arguments)
        assert torch.equal(parameter, torch.ones(300))
        assert state["exp_avg_sq_codes"].min() == 1
        assert not any(moment.any() for moment in moments(state))


# ---------------------------------------------------------------- the operator itself


def samples() -> list[tuple[Any, ...]]:
    shapes = [(1,), (67,), (5, 51), (16, 16), (257,), (0,), (3, 1667)]
    cases = []
    for shape in shapes:
        num_elements = torch.Size(shape).numel()
        cases.append((torch.randn(shape), torch.randn(shape), num_elements))
    cases.append((torch.randn(7, 67).t(), torch.randn(67, 14)[:, ::2], 7 * 67))
    cases.append((torch.randn(9001).bfloat16(), torch.randn(9001).bfloat16(), 9001))
    return [
        (p, g, *new_state(n).values(), *maps().values(), torch.tensor(1.0), *SETTINGS.values())
        for p, g, n in cases
    ]


@pytest.mark.parametrize("index", range(9))
def test_opcheck(index: int) -> None:
    torch.library.opcheck(adamw_int8, samples()[index])


@pytest.mark.parametrize("sample", [1, 3, 5, 6, 7, 8])
def test_workspace_is_what_the_body_allocates(sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body is run outside the operator, with bitsandbytes' own, where a mode sees them."""
    from bitsandbytes.backends.cpu import ops

    def update(*args: Any, **kwargs: Any) -> None:
        ops._optimizer_update_8bit_blockwise_cpu(*args, gnorm_scale=1.0, **kwargs)

    monkeypatch.setattr(module, "_bitsandbytes_update", lambda: update)
    monkeypatch.setattr(module, "CPU_PIECE_ELEMENTS", 2048)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 4096)
    arguments = samples()[sample]
    known = [argument for argument in arguments if isinstance(argument, Tensor)]
    with torch.no_grad(), LiveBytes(known) as seen:
        adamw_int8._init_fn(*arguments)
    declared = workspace_bytes(*arguments)
    assert seen.peak_bytes == declared


def test_workspace_bounds_a_step_that_rounds_stochastically(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounding a piece comes when bitsandbytes' scratch is gone, and needs more than it."""
    from bitsandbytes.backends.cpu import ops

    def update(*args: Any, **kwargs: Any) -> None:
        ops._optimizer_update_8bit_blockwise_cpu(*args, gnorm_scale=1.0, **kwargs)

    monkeypatch.setattr(module, "_bitsandbytes_update", lambda: update)
    monkeypatch.setattr(module, "stochastic_copy_", _copied_outside_an_operator)
    arguments = (*samples()[8], [123456789, 987654321])
    known = [argument for argument in arguments if isinstance(argument, Tensor)]
    with torch.no_grad(), LiveBytes(known) as seen:
        adamw_int8._init_fn(*arguments)
    declared = workspace_bytes(*arguments)
    assert workspace_bytes(*arguments[:-1]) < seen.peak_bytes <= declared <= 1.5 * seen.peak_bytes


def _copied_outside_an_operator(
    target: Tensor, source: Tensor, *, rounding: Rounding, first_index: int
) -> None:
    stochastic_rounding._stochastic_copy._init_fn(
        target, source, rounding.step, *rounding.key, first_index
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient": torch.zeros(2, 300)}, "gradient has shape"),
        ({"parameter": torch.zeros(600, dtype=torch.float64)}, "parameter is torch.float64"),
        ({"exp_avg_codes": torch.zeros(599, dtype=torch.uint8)}, "exp_avg_codes has 599"),
        ({"exp_avg_sq_codes": torch.zeros(600)}, "exp_avg_sq_codes must be"),
        ({"exp_avg_scales": torch.zeros(2)}, "exp_avg_scales must be 3"),
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
        adamw_int8(**arguments, **maps(), step=torch.tensor(1.0), **SETTINGS)


def test_without_bitsandbytes_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_bitsandbytes(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_bitsandbytes)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        adamw_int8(
            torch.zeros(4),
            torch.zeros(4),
            **new_state(4),
            **maps(),
            step=torch.ones(()),
            **SETTINGS,
        )


def test_importing_the_module_does_not_import_bitsandbytes() -> None:
    code = "import sys, memrt.kernels.adamw_int8; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
