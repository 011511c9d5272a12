"""Linear layers over a packed weight, against autograd on the dense one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels.frozen_linear import frozen_linear
from memrt.kernels.nf4 import nf4_dequantize, nf4_quantize

SHAPE = (24, 40)  # [out, in]


def packed_weight(dtype: torch.dtype, in_out: bool) -> tuple[Tensor, partial[Tensor], Tensor]:
    torch.manual_seed(0)
    shape = SHAPE[::-1] if in_out else SHAPE
    packed = nf4_quantize(torch.randn(shape).to(dtype))
    dense = partial(nf4_dequantize, shape=shape, dtype=dtype)
    weight = dense(packed)
    return packed, dense, weight.t() if in_out else weight


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("in_out", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(7,), (2, 3), (0,)], ids=str)
def test_output_and_gradients(
    leading: tuple[int, ...], dtype: torch.dtype, in_out: bool, autocast: bool
) -> None:
    packed, dense, weight = packed_weight(dtype, in_out)
    x = torch.randn(*leading, SHAPE[1], dtype=dtype, requires_grad=True)
    bias = torch.randn(SHAPE[0], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        observed = frozen_linear(x, packed, bias, dense, weight_is_in_out=in_out)
        expected = functional.linear(x, weight, bias)
    assert observed.dtype == expected.dtype
    assert torch.equal(observed, expected)
    gradient = torch.randn_like(observed)
    got = torch.autograd.grad(observed, (x, bias), gradient)
    wanted = torch.autograd.grad(expected, (x, bias), gradient)
    tolerance = 4 * torch.finfo(observed.dtype).eps  # the order of a sum may differ
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def test_keeps_the_packed_weight_and_nothing_of_the_input() -> None:
    packed, dense, _ = packed_weight(torch.float32, False)
    x = torch.randn(5, SHAPE[1], requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(x, packed, None, dense)
    assert [tensor.data_ptr() for tensor in saved] == [packed.data_ptr()]


def test_an_input_without_a_gradient_keeps_nothing_and_ends_the_graph() -> None:
    packed, dense, _ = packed_weight(torch.float32, False)
    assert not frozen_linear(torch.randn(5, SHAPE[1]), packed, None, dense).requires_grad


def test_a_second_derivative_is_refused() -> None:
    packed, dense, _ = packed_weight(torch.float32, False)
    x = torch.randn(5, SHAPE[1], requires_grad=True)
    loss = frozen_linear(x, packed, None, dense).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
