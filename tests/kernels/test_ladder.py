"""A ladder's rung: against fp64, what it keeps for backward, and its eight-bit taps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memrt.kernels.ladder import (
    _down,
    _mix,
    _workspace_bytes,
    ladder_down,
    ladder_mix,
    ladder_reference,
)
from memrt.kernels.ladder_gradients import _gradients, _gradients_workspace_bytes
from tests.kernels.live_bytes import LiveBytes

HIDDEN, SIDE = 40, 10
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def inputs(
    *leading: int, dtype: torch.dtype, vector: bool = False, bias: bool = True, seed: int = 0
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden = made(*leading, HIDDEN)
    weight, state = made(SIDE, HIDDEN), made(*leading, SIDE)
    gate = torch.rand(SIDE if vector else 1, generator=generator)
    return hidden, weight, made(SIDE) if bias else None, state, gate


def outcome(function, values: Inputs, dtype: torch.dtype, **options: str):  # type: ignore[no-untyped-def]
    """Z and the gradients of everything but H, for one given dZ."""
    hidden, *others = (None if v is None else v.detach().to(dtype) for v in values)
    leaves = [None if v is None else v.requires_grad_() for v in others]
    z = function(hidden, *leaves, **options)
    generator = torch.Generator().manual_seed(9)
    z.backward(torch.randn(z.shape, generator=generator).to(z.dtype))
    return [z.detach(), *(v.grad for v in leaves if v is not None)]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-12))
        for a, b in zip(found, truth, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("leading", [(1,), (67,), (2, 33)], ids=str)
def test_is_as_close_to_fp64_as_plain_pytorch(
    leading: tuple[int, ...], bias: bool, vector: bool, dtype: torch.dtype
) -> None:
    values = inputs(*leading, dtype=dtype, vector=vector, bias=bias)
    truth = outcome(ladder_reference, values, torch.float64)
    plain = errors(outcome(ladder_reference, values, dtype), truth)
    ours = errors(outcome(ladder_down, values, dtype), truth)
    floors = [torch.finfo(dtype).eps] * len(truth)
    floors[-1] *= cancellation(values)
    for error, other, floor in zip(ours, plain, floors, strict=True):
        assert error <= 2 * other + floor


def cancellation(values: Inputs) -> float:
    """How much larger the terms of the gate's gradient are than their sum."""
    hidden, weight, bias, state, gate = (None if v is None else v.double() for v in values)
    difference = state - torch.nn.functional.linear(hidden, weight, bias)
    gradient = torch.randn(state.shape, generator=torch.Generator().manual_seed(9)).double()
    terms = (difference * gradient).flatten(0, -2)
    total = terms.sum(dim=0) if gate.numel() > 1 else terms.sum()
    return float(terms.abs().sum() / total.norm())


def test_the_mix_alone_gives_the_same() -> None:
    hidden, weight, bias, state, gate = inputs(2, 7, dtype=torch.float32)

    def mixed(hidden: Tensor, weight: Tensor, bias: Tensor, state: Tensor, gate: Tensor) -> Tensor:
        return ladder_mix(torch.nn.functional.linear(hidden, weight, bias), state, gate)

    values = (hidden, weight, bias, state, gate)
    one, other = (outcome(f, values, torch.float32) for f in (mixed, ladder_down))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_both_ends_of_the_gate_are_exact() -> None:
    hidden, weight, bias, state, _ = inputs(5, dtype=torch.float32)
    down = ladder_down(hidden, weight, bias)
    assert torch.equal(ladder_down(hidden, weight, bias, state, torch.zeros(1)), down)
    hidden[0] = 1e30
    assert torch.equal(ladder_down(hidden, weight, bias, state, torch.ones(1)), state)


def test_with_and_without_gradients_the_bits_are_the_same() -> None:
    values = inputs(3, 5, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = ladder_down(*values)
    values[1].requires_grad_()
    assert torch.equal(ladder_down(*values), expected)


def kept(*, kind: str, dtype: torch.dtype) -> dict[torch.dtype, int]:
    """Elements that backward keeps by dtype, beside the weight, the gate and other parameters."""
    hidden, weight, bias, state, gate = inputs(4, 8, dtype=dtype)
    leaves = [v.requires_grad_() for v in (weight, bias, state, gate) if v is not None]
    found: dict[torch.dtype, int] = {}
    own = {leaf.untyped_storage()._cdata for leaf in leaves}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ladder_down(hidden, *leaves, kept=kind)
    return found


def test_what_is_kept_is_the_tap_and_one_difference() -> None:
    tokens = 4 * 8
    exact = kept(kind="exact", dtype=torch.bfloat16)
    assert exact == {torch.bfloat16: tokens * (HIDDEN + SIDE)}
    narrow = kept(kind="float8", dtype=torch.bfloat16)
    assert narrow == {
        torch.float8_e4m3fn: tokens * HIDDEN,
        torch.uint8: tokens * 2,  # groups of 32 and of 8
        torch.bfloat16: tokens * SIDE,
    }


def test_an_eight_bit_tap_rounds_the_weight_gradient_alone() -> None:
    values = inputs(50, dtype=torch.float32)
    values[0][3] = 0  # a token of zeros has no scale of its own
    exact = outcome(ladder_down, values, torch.float32)
    rounded = outcome(ladder_down, values, torch.float32, kept="float8")
    for index, (a, b) in enumerate(zip(exact, rounded, strict=True)):
        if index != 1:
            assert torch.equal(a, b)
    # E4M3 rounds to 3 bits behind the leading one: at most 2^-4 of every element
    error = float((exact[1] - rounded[1]).norm() / exact[1].norm())
    assert 0 < error < 2**-4


def test_autocast_multiplies_in_its_dtype_and_keeps_that() -> None:
    hidden, weight, bias, state, gate = inputs(6, dtype=torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = ladder_down(hidden, weight, bias, state, gate)
    z.sum().backward()
    assert z.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(
        z, ladder_reference(hidden, weight, bias, state, gate), rtol=2**-7, atol=2**-5
    )


def test_a_hidden_state_gets_no_gradient_and_an_empty_batch_none() -> None:
    hidden, weight, bias, state, gate = inputs(0, dtype=torch.float32)
    for tensor in (hidden, weight, state):
        tensor.requires_grad_()
    ladder_down(hidden, weight, bias, state, gate).sum().backward()
    assert hidden.grad is None
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("float8", [False, True])
def test_the_operators_pass_opcheck(float8: bool) -> None:
    hidden, weight, bias, state, gate = inputs(3, 4, dtype=torch.float32)
    leaves = [v.requires_grad_() for v in (weight, bias, state, gate) if v is not None]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_down, (hidden, *leaves, float8), test_utils=checks)
    torch.library.opcheck(_down, (hidden, weight, None, None, None, float8), test_utils=checks)
    down = torch.randn_like(state).requires_grad_()
    torch.library.opcheck(_mix, (down, state, gate), test_utils=checks)
    gradient, difference = (value.detach() for value in (down, state))
    for given in (
        (gradient, difference, gate, True, torch.bfloat16, float8),
        (gradient, None, gate, False, torch.float32, float8),
    ):
        torch.library.opcheck(_gradients, given, test_utils=("test_schema", "test_faketensor"))


def test_workspace_of_backward_is_what_the_body_allocates() -> None:
    _, _, _, state, gate = inputs(4, 8, dtype=torch.bfloat16)
    for difference, dtype in ((state.float(), torch.float32), (None, torch.float32), (state, None)):
        given = (state, difference, gate, True, dtype or torch.bfloat16, True)
        held = [value for value in given if isinstance(value, Tensor)]
        with LiveBytes(held) as seen:
            left = _gradients._init_fn(*given)
        outputs = sum(value.numel() * value.element_size() for value in left)
        declared = _gradients_workspace_bytes(*given)
        small = 16 * SIDE  # the gate in another dtype, and one less it
        assert seen.peak_bytes <= outputs + declared + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_of_eight_bits_is_what_the_body_allocates(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 320, generator=generator).to(dtype)
    weight, state = hidden[:SIDE], torch.zeros(400, SIDE)
    for given in ((hidden, weight, None, None, None), (hidden, weight, None, state, torch.ones(1))):
        with LiveBytes([value for value in given if isinstance(value, Tensor)]) as seen:
            left = _down._init_fn(*given, True)
        outputs = sum(value.numel() * value.element_size() for value in left)
        declared = _workspace_bytes(*given, True)
        groups = 8 * 4 * 400 * 10  # numbers of a group
        assert outputs + declared / 2 <= seen.peak_bytes <= outputs + declared + groups


def test_bad_arguments_are_refused() -> None:
    hidden, weight, bias, state, _ = inputs(2, dtype=torch.float32)
    with pytest.raises(ValueError, match="give both or neither"):
        ladder_down(hidden, weight, bias, state)
    with pytest.raises(ValueError, match="kept='half'"):
        ladder_down(hidden, weight, bias, kept="half")
