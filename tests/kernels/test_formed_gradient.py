"""Operations on a gradient by channel, against their formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.kernels import formed_gradient as module
from memrt.kernels import mixed_precision
from memrt.kernels.formed_gradient import (
    add_channels_,
    add_channels_reference,
    add_workspace_bytes,
    channel_norms,
    gram,
    norms_workspace_bytes,
    project_gradient,
)
from memrt.kernels.stochastic_rounding import Rounding, rounding_key, stochastic_copy_
from tests.kernels.live_bytes import LiveBytes

EPS = 2**-24
SHAPES = [(24, 67), (67, 24), (32, 32), (1, 7), (7, 1)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=[64, 2**25], ids=["blocks", "whole"], autouse=True)
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", request.param)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@each_shape
@each_dtype
@pytest.mark.parametrize("contiguous", [True, False])
def test_projection(shape: tuple[int, int], dtype: torch.dtype, contiguous: bool) -> None:
    left, rank = shape[0] < shape[1], min(5, min(shape))
    gradient = normal(*shape, dtype=dtype) if contiguous else normal(*shape[::-1], dtype=dtype).t()
    basis = normal(min(shape), rank, seed=1)
    found = project_gradient(gradient, basis, left=left)
    wide, lift = gradient.double(), basis.double()
    expected = lift.t() @ wide if left else wide @ lift
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * 24 * EPS * 9)


@each_shape
@each_dtype
def test_norms_and_scaling_by_channel(shape: tuple[int, int], dtype: torch.dtype) -> None:
    left, dim = shape[0] < shape[1], 0 if shape[0] < shape[1] else 1
    gradient = normal(*shape, dtype=dtype)
    norms = channel_norms(gradient, left=left)
    torch.testing.assert_close(norms.double(), gradient.double().norm(dim=dim), rtol=1e-6, atol=0)
    for factors in (normal(max(shape), seed=2), torch.tensor(0.37)):
        weight = normal(*shape, seed=3, dtype=dtype)
        by_hand = factors if factors.dim() == 0 else factors.unsqueeze(dim)
        expected = 0.9 * weight.double() - 0.5 * gradient.double() * by_hand.double()
        add_channels_(weight, gradient, factors, alpha=-0.5, decay=0.9, left=left)
        assert weight.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(weight.double(), expected, rtol=4 * EPS, atol=16 * EPS)
        else:  # one rounding, of the fp32 sum
            assert float((weight.double() - expected).abs().max()) <= 2**-8 * 16
            near = (weight.double() - expected).abs() <= 2**-8 * expected.abs() + 16 * EPS
            assert bool(near.all())


@pytest.mark.parametrize("_blocks", [2**25], ids=["whole"], indirect=True)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "rounded stochastically"])
def test_compiled_pieces_give_the_same_norms_and_weights(
    form: str, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pieces compiled, the rest eager. Where there is no C++ compiler this must not pass."""
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1024)
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    gradient, weight = normal(40, 64, dtype=dtype), normal(40, 64, seed=3, dtype=dtype)
    rounding = rounding_of(7) if "rounded" in form else None
    factors = normal(64 if left else 40, seed=2)

    def found() -> tuple[Tensor, Tensor]:
        norms, moved = channel_norms(gradient, left=left), weight.clone()
        options: dict[str, Any] = {"alpha": -0.01, "decay": 0.999, "left": left}
        add_channels_(moved, gradient, factors, rounding=rounding, **options)
        return norms, moved

    eager = found()
    monkeypatch.setattr(module, "COMPILED_FROM_ELEMENTS", 2048)
    ran = []
    for name in ("_compiled_squares", "_compiled_add"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function: ran.append(f) or f(*a))
    compiled = found()
    both = 2 * (dtype is not torch.float32) + 2 * (left or dtype is not torch.float32)
    assert len(ran) == both
    assert not any(function.fell_back for function in ran)
    torch.testing.assert_close(compiled[0], eager[0], rtol=64 * EPS, atol=0)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(compiled[1], eager[1], rtol=2 * ulp, atol=1e-7)


@each_shape
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_bf16_weight_is_rounded_as_its_fp32_copy_would_be(
    shape: tuple[int, int], contiguous: bool
) -> None:
    """To the bit: one rounding, by the hash of the element's place in the weight."""
    left = shape[0] < shape[1]
    gradient, weight = normal(*shape, dtype=torch.bfloat16), normal(*shape, seed=3).bfloat16()
    if not contiguous:
        weight = weight.t().contiguous().t()
    factors, rounding = normal(max(shape), seed=2), rounding_of(7)
    options: dict[str, Any] = {"alpha": -0.01, "decay": 0.999, "left": left}
    wide = weight.float()
    add_channels_(wide, gradient, factors, **options)
    torch.testing.assert_close(
        wide, add_channels_reference(weight, gradient, factors, **options), rtol=0, atol=8 * EPS
    )
    expected = torch.empty(shape, dtype=torch.bfloat16)
    stochastic_copy_(expected, wide, rounding=rounding)
    add_channels_(weight, gradient, factors, rounding=rounding, **options)
    assert torch.equal(weight, expected)


def rounding_of(step: int) -> Rounding:
    return Rounding(rounding_key(1, 2), torch.tensor(float(step)))


@each_shape
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e25])
def test_gram(shape: tuple[int, int], size: float) -> None:
    left = shape[0] < shape[1]
    gradient = normal(*shape) * size
    found, sound = gram(gradient, left=left)
    small = gradient.double() / gradient.double().abs().max()
    expected = small @ small.t() if left else small.t() @ small
    assert bool(sound)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * 67 * EPS * 4)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gram_matrix_of_nothing_is_the_identity(bad: float) -> None:
    gradient = normal(4, 9) * 0.0 if bad == 0.0 else normal(4, 9)
    gradient[1, 2] = bad
    found, sound = gram(gradient, left=True)
    assert not bool(sound)
    assert torch.equal(found, torch.eye(4))


# ---------------------------------------------------------------- operators


def write_call(
    shape: tuple[int, int], *, dtype: torch.dtype, rounding: Rounding | None = None
) -> dict[str, Any]:
    return {
        "weight": normal(*shape, seed=3).to(dtype),
        "gradient": normal(*shape).to(dtype),
        "factors": normal(max(shape), seed=2),
        "alpha": -0.5,
        "decay": 0.9,
        "left": shape[0] < shape[1],
        "step": None if rounding is None else rounding.step,
        "rounding_key": None if rounding is None else rounding.key,
    }


def test_opcheck() -> None:
    operators = torch.ops.memrt
    for shape in ((5, 7), (7, 5), (0, 3)):
        matrix = normal(*shape, dtype=torch.bfloat16)
        torch.library.opcheck(operators.channel_norms.default, (matrix, shape[0] < shape[1]))
        call = write_call(shape, dtype=torch.bfloat16, rounding=rounding_of(1))
        torch.library.opcheck(operators.add_channels.default, (), call)


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=str,
)
def test_workspace_is_what_the_bodies_allocate(
    dtype: torch.dtype, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 4096)
    call = write_call((200, 120), dtype=dtype, rounding=rounding_of(1) if rounded else None)
    held = [value for value in call.values() if isinstance(value, Tensor)]
    with LiveBytes(held) as seen:
        module._add_channels._init_fn(**call)
    declared = add_workspace_bytes(**call)
    # what stochastic rounding keeps inside its own operator is not seen
    scratch = 29 * (4096 // 120 * 120) if rounded else 0
    assert declared - scratch <= seen.peak_bytes <= declared
    with LiveBytes(held) as seen:
        norms = module._channel_norms._init_fn(call["gradient"], False)
    assert seen.peak_bytes == norms_workspace_bytes(call["gradient"], False) + 4 * norms.numel()


def test_on_cuda_nothing_is_copied() -> None:
    """Of any size: partial sums of squares alone, for 1024 programs or a span for each channel."""
    with FakeTensorMode():
        for shape in ((4096, 11008), (11008, 4096), (1, 1), (0, 3)):
            left = shape[0] < shape[1]
            matrix = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            assert add_workspace_bytes(matrix, matrix, torch.empty(()), -1.0, 1.0, left) == 0
            assert norms_workspace_bytes(matrix, left) <= 4 * max(max(shape), 2 * 128 * 1024)


def test_what_is_wrong_is_named() -> None:
    weight = normal(4, 9)
    for options, words in (
        ({"gradient": normal(9, 4)}, r"the gradient is \(9, 4\), the weight \(4, 9\)"),
        ({"factors": normal(4)}, r"factors are \(4,\) of torch\.float32: give fp32, one a channel"),
        ({"factors": normal(9).bfloat16()}, "give fp32"),
        ({"rounding": rounding_of(1)}, r"rounding is to bf16, the weight is torch\.float32"),
    ):
        given = {"gradient": weight, "factors": normal(9), **options}
        with pytest.raises(ValueError, match=words):
            add_channels_(weight, alpha=1.0, left=True, **given)
