"""State formats by themselves: layouts, bytes, and the fp32 step on every dtype and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memrt.kernels.stochastic_rounding import random_bits_reference, stochastic_round_reference
from memrt.optimizers import float32_state
from memrt.optimizers.state_formats import (
    MIN_QUANTIZED_ELEMENTS,
    STATE_FORMATS,
    AdamWSettings,
    Float32,
    Fp8,
    Int4,
    Int8,
    Update,
)
from tests.kernels.live_bytes import LiveBytes

SETTINGS = AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact_step(weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, t: int) -> None:
    """AdamW in fp64, in place."""
    s = SETTINGS
    weight.mul_(1 - s.lr * s.weight_decay)
    m.copy_(s.beta1 * m + (1 - s.beta1) * gradient)
    v.copy_(s.beta2 * v + (1 - s.beta2) * gradient * gradient)
    denominator = (v / (1 - s.beta2**t)).sqrt() + s.eps
    weight.sub_(s.lr * (m / (1 - s.beta1**t)) / denominator)


@pytest.mark.parametrize("name", list(STATE_FORMATS))
@pytest.mark.parametrize("shape", [(1,), (67, 3), (256, 256), (5, 1001), (0,)])
def test_created_state_is_as_laid_out(name: str, shape: tuple[int, ...]) -> None:
    form = STATE_FORMATS[name]()
    state = form.create(shape, DEVICE)
    form.check(state, shape, owner="the new state")
    assert form.name == name
    assert all(not tensor.any() for tensor in state.values())
    assert sum(tensor.untyped_storage().nbytes() for tensor in state.values()) == form.state_bytes(
        shape
    )


def test_bytes_an_element_are_what_the_docstring_says() -> None:
    shape, num_elements = (512, 384), 512 * 384
    assert Float32().state_bytes(shape) == 8 * num_elements + 4
    assert Int8().state_bytes(shape) == (2 + 8 / 256) * num_elements + 4
    # a ragged last block has scales of its own
    assert Int8().state_bytes((4097,)) == 2 * 4097 + 8 * 17 + 4
    assert Fp8().state_bytes(shape) == (2 + 10 / 128) * num_elements + 4
    assert Fp8().state_bytes((4097,)) == 2 * 4097 + 10 * 33 + 4
    assert Int4().state_bytes(shape) == (1 + 8 / 128) * num_elements + 4
    assert Int4().state_bytes((4097,)) == 2 * 2049 + 8 * 33 + 4
    assert (
        Int8.min_elements == Fp8.min_elements == Int4.min_elements == MIN_QUANTIZED_ELEMENTS == 4096
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exp_avg": torch.zeros(5, 4)}, r"exp_avg of it is \(5, 4\).*expected \(4, 5\)"),
        ({"exp_avg_sq": torch.zeros(4, 5).bfloat16()}, "is .*bfloat16, expected .*float32"),
        ({"extra": torch.zeros(1)}, "the state of it holds .*extra.*, expected"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, Tensor], words: str) -> None:
    state = {**Float32().create((4, 5), DEVICE), **change}
    with pytest.raises(ValueError, match=words):
        Float32().check(state, (4, 5), owner="it")
    with pytest.raises(ValueError, match=words):
        Float32().load(state, (4, 5), DEVICE, owner="it")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_stepped_in_fp32(dtype: torch.dtype) -> None:
    """Against fp64, rounded to the parameter's dtype once a step. Moments keep fp32's precision."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(67, 3, generator=generator).to(dtype)
    exact, m, v = parameter.double(), torch.zeros(67, 3).double(), torch.zeros(67, 3).double()
    state = Float32().create(parameter.shape, DEVICE)
    for t in range(1, 21):
        gradient = torch.randn(67, 3, generator=generator).to(dtype)
        Float32().adamw([Update(parameter, gradient, state)], SETTINGS)
        exact_step(exact, gradient.double(), m, v, t)
        rounded = exact.to(dtype)
        # fp32 error may tip a value that lies on the edge between two of them: one ulp, rarely
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(parameter, rounded, rtol=ulp, atol=0)
        assert (parameter == rounded).float().mean() > 0.99
        exact = parameter.double()
    assert state["step"] == 20
    torch.testing.assert_close(state["exp_avg"].double(), m, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state["exp_avg_sq"].double(), v, rtol=1e-5, atol=1e-7)


def test_the_second_moment_of_a_bf16_parameter_decays() -> None:
    """In bf16 v * 0.999 is v again; after 500 steps without gradient it must be 0.999^500 of it."""
    parameter = torch.ones(8, dtype=torch.bfloat16)
    state = Float32().create(parameter.shape, DEVICE)
    settings = AdamWSettings(lr=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    Float32().adamw([Update(parameter, torch.ones_like(parameter), state)], settings)
    for _ in range(500):
        Float32().adamw([Update(parameter, torch.zeros_like(parameter), state)], settings)
    expected = torch.full((8,), 1e-3 * 0.999**500)
    torch.testing.assert_close(state["exp_avg_sq"], expected, rtol=500 * 2**-24, atol=0)


@pytest.mark.parametrize("name", list(STATE_FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_of_parameter_and_gradient_does_not_matter(name: str, dtype: torch.dtype) -> None:
    """torch's fused kernel reads memory in order, whatever the strides: it must not see these."""
    weight, slope = torch.randn(64, 96).to(dtype), torch.randn(64, 96).to(dtype)
    results = []
    for parameter, gradient in [
        (weight.clone(), slope.clone()),
        (weight.t().contiguous().t(), slope.clone()),
        (weight.t().contiguous().t(), slope.t().contiguous().t()),
        (weight.clone(), slope.t().contiguous().t()),
        (weight.repeat_interleave(2, dim=1)[:, ::2], slope.repeat_interleave(3, dim=1)[:, ::3]),
    ]:
        form = STATE_FORMATS[name]()
        state = form.create(parameter.shape, DEVICE)
        for _ in range(2):
            form.adamw([Update(parameter, gradient, state)], SETTINGS)
        assert state["step"] == 2
        results.append((parameter, state))
    for parameter, state in results[1:]:
        torch.testing.assert_close(parameter, results[0][0], rtol=0, atol=0)
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, results[0][1][key], rtol=0, atol=0)


def test_pieces_change_neither_result_nor_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, slope = torch.randn(5001).bfloat16(), torch.randn(5001).bfloat16()
    results = []
    for size in (2**22, 512):
        monkeypatch.setattr(float32_state, "PIECE_ELEMENTS", size)
        parameter, state = weight.clone(), Float32().create((5001,), DEVICE)
        for _ in range(3):
            Float32().adamw([Update(parameter, slope, state)], SETTINGS)
        results.append((parameter, state))
    (whole, whole_state), (pieced, pieced_state) = results
    assert torch.equal(pieced, whole)
    assert pieced_state["step"] == whole_state["step"] == 3
    # the kernel's vector part and its tail differ by a rounding
    torch.testing.assert_close(
        pieced_state["exp_avg_sq"], whole_state["exp_avg_sq"], rtol=3 * 2**-24, atol=0
    )


@pytest.mark.parametrize(
    ("dtype", "expected_bytes"), [(torch.float32, 0), (torch.bfloat16, 8 * 1024 + 4)]
)
def test_temporaries_are_bounded_by_a_piece(
    dtype: torch.dtype, expected_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32_state, "PIECE_ELEMENTS", 1024)
    parameter, gradient = torch.randn(5001).to(dtype), torch.randn(5001).to(dtype)
    state = Float32().create((5001,), DEVICE)
    with LiveBytes([parameter, gradient, *state.values()]) as seen:
        Float32().adamw([Update(parameter, gradient, state)], SETTINGS)
    assert seen.peak_bytes == expected_bytes


def test_code_maps_exist_once() -> None:
    form = Int8()
    assert form.shared_tensors() == []
    updates = [
        Update(torch.randn(300), torch.randn(300), form.create((300,), DEVICE)) for _ in range(3)
    ]
    form.adamw(updates, SETTINGS)
    form.adamw(updates, SETTINGS)
    assert sum(tensor.untyped_storage().nbytes() for tensor in form.shared_tensors()) == 2048
    assert all(update.state["step"] == 2 for update in updates)


# ---------------------------------------------------------------- every format


@pytest.mark.parametrize("name", list(STATE_FORMATS))
def test_many_updates_at_once_are_each_alone(name: str) -> None:
    """Whatever their dtypes, strides, rounding keys, and how often each was stepped before."""
    form = STATE_FORMATS[name]()

    def made() -> list[Update]:
        generator = torch.Generator().manual_seed(3)
        kinds = [(torch.bfloat16, (1, 2)), (torch.float32, None), (torch.float16, None)]
        found = []
        for number, (dtype, key) in enumerate([*kinds, (torch.bfloat16, None), *kinds]):
            shape = (67, 3 + number)
            given = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
            if number == 5:
                given = [tensor.t().contiguous().t() for tensor in given]
            found.append(Update(*given, form.create(shape, DEVICE), key))
            for _ in range(number):
                form.adamw(found[-1:], SETTINGS)
        return found

    together, alone = made(), made()
    form.adamw(together, SETTINGS)
    for number, (ours, theirs) in enumerate(zip(together, alone, strict=True)):
        form.adamw([theirs], SETTINGS)
        assert ours.state["step"] == number + 1
        assert torch.equal(ours.parameter, theirs.parameter), number
        assert all(torch.equal(ours.state[key], theirs.state[key]) for key in ours.state), number


@pytest.mark.parametrize(
    ("name", "share"), [("float32", 1e-6), ("int8", 0.03), ("fp8", 0.03), ("int4", 0.35)]
)
def test_every_format_stays_near_fp32_adamw(name: str, share: float) -> None:
    """Twenty steps of log-normal gradients, within what the format rounds off its moments."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.nn.Parameter(torch.zeros(2**14))
    optimizer = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    form, parameter = STATE_FORMATS[name](), torch.zeros(2**14)
    state = form.create(parameter.shape, DEVICE)
    for _ in range(20):
        noise = torch.randn(2, 2**14, generator=generator)
        exact.grad = (noise[0] + 0.3) * noise[1].exp()
        optimizer.step()
        form.adamw([Update(parameter, exact.grad, state)], SETTINGS)
    assert (parameter - exact.detach()).norm() < share * exact.detach().norm()


KEY = (123456789, 987654321)


@pytest.mark.parametrize("name", list(STATE_FORMATS))
def test_five_hundred_zero_gradients_do_not_drift(name: str) -> None:
    """After moments have died away a weight does nothing but decay."""
    form, parameter = STATE_FORMATS[name](), torch.randn(4096)
    state = form.create((4096,), DEVICE)
    for _ in range(10):
        form.adamw([Update(parameter, torch.randn(4096), state)], SETTINGS)
    zero, start = torch.zeros(4096), parameter.clone()
    for step in range(500):
        form.adamw([Update(parameter, zero, state)], SETTINGS)
        if step == 150:
            resting = parameter.clone()
    decay = (1 - SETTINGS.lr * SETTINGS.weight_decay) ** 349
    torch.testing.assert_close(parameter, resting * decay, rtol=349 * 2**-24, atol=2e-5)
    # what the last moments did before: sum of 0.9^t / sqrt(0.99^t) steps of lr at most
    assert (parameter - start * (1 - SETTINGS.lr * SETTINGS.weight_decay) ** 500).abs().max() < 0.2


@pytest.mark.parametrize("name", list(STATE_FORMATS))
def test_bf16_weights_take_updates_that_rounding_to_the_nearest_loses(name: str) -> None:
    """Steps of 1e-4 on weights of 1, where bf16 has steps of 2^-8 below and 2^-7 above."""
    settings = AdamWSettings(lr=1e-4, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
    moved = {}
    for key in (None, KEY):
        form, parameter = STATE_FORMATS[name](), torch.ones(4096).bfloat16()
        state = form.create((4096,), DEVICE)
        for _ in range(50):
            update = Update(parameter, torch.ones_like(parameter), state, key)
            form.adamw([update], settings)
        moved[key] = (1 - parameter.float()).mean().item()
    assert moved[None] == 0
    # 50 steps of 2^-8 with probability 0.026 in each of 4096 weights; five standard deviations
    assert moved[KEY] == pytest.approx(50e-4, abs=5 * (50 * 0.026) ** 0.5 * 2**-8 / 64)


@pytest.mark.parametrize("name", list(STATE_FORMATS))
def test_stochastic_rounding_is_of_the_fp32_weight(name: str) -> None:
    """And reproducible: of the key, the step and the element, in pieces or whole."""
    weight, slope = torch.randn(5001).bfloat16(), torch.randn(5001)
    results = []
    for parameter in (weight.clone(), weight.clone(), weight.float()):
        form = STATE_FORMATS[name]()
        state = form.create((5001,), DEVICE)
        form.adamw([Update(parameter, slope, state, KEY)], SETTINGS)
        results.append(parameter)
    once, again, exact = results
    assert torch.equal(once, again)
    index = torch.arange(5001)
    bits = random_bits_reference(index, torch.tensor(KEY), torch.tensor(1))
    assert torch.equal(once, stochastic_round_reference(exact, bits))
