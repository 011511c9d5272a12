"""Linear layers that hand their weight gradient to a sink, against autograd's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from memrt.kernels.projected_linear import projected_conv1d, projected_linear
from tests.kernels.live_bytes import LiveBytes

FEATURES_IN, FEATURES_OUT = 12, 20


class FullGradient:
    """A sink that forms the very gradient that the layer does not."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.calls = 0
        self.dtypes: set[torch.dtype] = set()

    def accumulate(self, rows: Tensor, columns: Tensor) -> None:
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        self.calls += 1
        self.dtypes |= {rows.dtype, columns.dtype}
        product = rows.t() @ columns
        self.total = product if self.total is None else self.total + product


class Nothing:
    """A sink that keeps nothing."""

    def accumulate(self, rows: Tensor, columns: Tensor) -> None:
        assert rows.shape[0] == columns.shape[0]


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.t(), bias)


LAYERS: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
    (projected_linear, functional.linear),
    (projected_conv1d, conv1d),
]
each_layer = pytest.mark.parametrize(("layer", "plain"), LAYERS, ids=["linear", "conv1d"])


def leaves(
    plain: Callable[..., Tensor], *leading: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (
        (FEATURES_OUT, FEATURES_IN) if plain is functional.linear else (FEATURES_IN, FEATURES_OUT)
    )
    shapes = ((*leading, FEATURES_IN), shape, (FEATURES_OUT,))
    x, weight, bias = (
        torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes
    )
    return x, weight, bias


def loss_of(output: Tensor) -> Tensor:
    return output.float().tanh().square().sum()


def run(layer: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], *rest: Any) -> list[Any]:
    """Return the output and the gradients of x, weight and bias."""
    given = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    output = layer(*given, *rest)
    loss_of(output).backward()
    return [output, *(None if t is None else t.grad for t in given)]


@each_layer
@pytest.mark.parametrize("leading", [(1,), (7,), (3, 5), (2, 3, 5), (), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_all_gradients_are_autograds_bit_for_bit(
    layer: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    leading: tuple[int, ...],
    dtype: torch.dtype,
    with_bias: bool,
) -> None:
    x, weight, bias = leaves(plain, *leading, dtype=dtype)
    tensors = (x, weight, bias if with_bias else None)
    sink = FullGradient()
    output, x_gradient, weight_gradient, bias_gradient = run(layer, tensors, sink)
    expected = run(plain, tensors)
    assert torch.equal(output, expected[0])
    assert torch.equal(x_gradient, expected[1])
    assert weight_gradient is None
    assert sink.total is not None
    assert torch.equal(sink.total, expected[2])
    assert (bias_gradient is None) == (not with_bias)
    if with_bias:
        assert torch.equal(bias_gradient, expected[3])


def test_conv1d_is_that_of_transformers() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    x, weight, bias = leaves(conv1d, 3, 5)
    module = pytorch_utils.Conv1D(FEATURES_OUT, FEATURES_IN)
    module.weight.data, module.bias.data = weight.detach(), bias.detach()
    sink = FullGradient()
    output, *_ = run(projected_conv1d, (x, weight, bias), sink)
    expected = module(x)
    loss_of(expected).backward()
    assert torch.equal(output, expected)
    assert sink.total is not None
    assert torch.equal(sink.total, module.weight.grad)


@each_layer
def test_non_contiguous_input_and_gradient(
    layer: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    _, weight, bias = leaves(plain, 3, 5)
    x = torch.randn(FEATURES_IN, 5, 3, dtype=torch.float32).permute(2, 1, 0).requires_grad_()
    gradient = torch.randn(FEATURES_OUT, 5, 3).permute(2, 1, 0)
    for upstream in (gradient, torch.ones(()).expand(3, 5, FEATURES_OUT)):
        x.grad = weight.grad = None
        sink = FullGradient()
        layer(x, weight, bias, sink).backward(upstream)
        ours, x.grad = x.grad, None
        plain(x, weight, bias).backward(upstream)
        torch.testing.assert_close(ours, x.grad)
        torch.testing.assert_close(sink.total, weight.grad)


@each_layer
def test_who_needs_no_gradient_gets_none(
    layer: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    x, weight, bias = leaves(plain, 7)
    sink = FullGradient()
    output = layer(x.detach(), weight, bias.detach(), sink)  # as after a frozen embedding
    assert [t is None for t in output.grad_fn.saved_tensors] == [False, True]  # type: ignore[union-attr]
    loss_of(output).backward()
    assert sink.calls == 1
    frozen = layer(x, weight.detach(), bias, sink)
    assert [t is None for t in frozen.grad_fn.saved_tensors] == [True, False]  # type: ignore[union-attr]
    loss_of(frozen).backward()
    assert sink.calls == 1
    assert x.grad is not None
    assert bias.grad is not None
    assert not layer(x.detach(), weight.detach(), bias.detach(), sink).requires_grad
    with torch.no_grad():
        evaluated = layer(x, weight, bias, sink)
    assert torch.equal(evaluated, plain(x, weight, bias).detach())
    assert not evaluated.requires_grad


@each_layer
def test_two_micro_batches_and_two_uses_reach_the_sink(
    layer: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    x, weight, bias = leaves(plain, 8)
    sink = FullGradient()
    for half in (x[:4], x[4:]):
        loss_of(layer(half, weight, bias, sink)).backward()
    loss_of(layer(x, weight, bias, sink) + layer(2 * x, weight, bias, sink)).backward()
    assert sink.calls == 4
    for half in (x[:4], x[4:]):
        loss_of(plain(half, weight, bias)).backward()
    loss_of(plain(x, weight, bias) + plain(2 * x, weight, bias)).backward()
    torch.testing.assert_close(sink.total, weight.grad)


@each_layer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_delivers_once_per_backward(
    layer: Callable[..., Tensor], plain: Callable[..., Tensor], use_reentrant: bool
) -> None:
    x, weight, bias = leaves(plain, 7)
    sink = FullGradient()
    output = checkpoint(
        lambda t: layer(t, weight, bias, sink).tanh(), x, use_reentrant=use_reentrant
    )
    assert isinstance(output, Tensor)
    assert sink.calls == 0
    loss_of(output).backward()
    assert sink.calls == 1
    expected = run(lambda *t: plain(*t).tanh(), (x, weight, bias))
    assert x.grad is not None
    assert torch.equal(x.grad, expected[1])
    assert sink.total is not None
    assert torch.equal(sink.total, expected[2])


@each_layer
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast_in_backward", [False, True])
def test_autocast_keeps_the_cast_input_and_the_weight_itself(
    layer: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    checkpointed: bool,
    autocast_in_backward: bool,
) -> None:
    x, weight, bias = leaves(plain, 7)
    sink = FullGradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if checkpointed:
            output = checkpoint(layer, x, weight, bias, sink, use_reentrant=False)
        else:
            output = layer(x, weight, bias, sink)
            saved = output.grad_fn.saved_tensors  # type: ignore[union-attr]
            assert saved[0].dtype == torch.bfloat16
            assert saved[1].data_ptr() == weight.data_ptr()
        # A cast weight that was cached without grad mode would cut this use off.
        expected = plain(x, weight, bias)
    assert torch.equal(output, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast_in_backward):
        ours = torch.autograd.grad(loss_of(output), (x, bias))
        theirs = torch.autograd.grad(loss_of(expected), (x, bias, weight))
    assert sink.dtypes == {torch.bfloat16}
    assert ours[0].dtype == torch.float32
    assert torch.equal(ours[0], theirs[0])
    # Ours is summed in fp32; plain's is rounded to bf16, half an eps of each element.
    torch.testing.assert_close(ours[1], theirs[1], rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    assert sink.total is not None
    assert torch.equal(sink.total.float(), theirs[2])


def test_wrong_dtypes_second_derivatives_and_changed_weights_are_refused() -> None:
    x, weight, bias = leaves(functional.linear, 7)
    with pytest.raises(RuntimeError, match="dtype"):
        projected_linear(x.bfloat16(), weight, bias, FullGradient())
    output = projected_linear(x, weight, bias, FullGradient())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss_of(output), x, create_graph=True, retain_graph=True)
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(output).backward()


@each_layer
@pytest.mark.parametrize("fake", [False, True])
def test_no_weight_gradient_is_ever_alive(
    layer: Callable[..., Tensor], plain: Callable[..., Tensor], fake: bool
) -> None:
    peaks = []
    for function, rest in ((plain, ()), (layer, (Nothing(),))):
        mode = FakeTensorMode() if fake else contextlib.nullcontext()
        with mode:
            x = torch.randn(2, 4, FEATURES_IN, requires_grad=True)
            shape = leaves(plain, 1)[1].shape
            weight = torch.randn(shape, requires_grad=True)
            with LiveBytes([x, weight]) as live:
                output = function(x, weight, None, *rest)
                output.backward(torch.ones_like(output))
                peaks.append(live.peak_bytes)
    ours = 4 * 8 * (2 * FEATURES_OUT + FEATURES_IN)  # Y, dY and dX, no dW
    assert peaks[1] == ours
    assert peaks[0] == ours + 4 * FEATURES_IN * FEATURES_OUT
