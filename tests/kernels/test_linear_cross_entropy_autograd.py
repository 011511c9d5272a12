"""The chunked head in autograd's hands: what it keeps and frees, who may be frozen or shared."""

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

from memrt.kernels import mixed_precision
from memrt.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels.live_bytes import LiveBytes

TOKENS, SIZE, VOCAB, CHUNK = 256, 32, 1000, 64
BLOCK = 16 * VOCAB  # elements


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, SIZE, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, SIZE, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)


def bytes_run(
    *,
    fake: bool = False,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    **options: Any,
) -> dict[str, int]:
    """Return the bytes of one forward and backward, beyond the inputs."""
    given = inputs(dtype)
    frozen = options.pop("frozen", ())
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode:
        labels = given[2]
        if isinstance(mode, FakeTensorMode):
            given = tuple(mode.from_tensor(x) for x in given)
        hidden, weight = given[0].requires_grad_(), given[1].requires_grad_()
        for index in frozen:
            (hidden, weight)[index].requires_grad_(False)
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with LiveBytes(given) as live:
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
            ):
                loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=CHUNK, **options)
            forward = live.peak_bytes
            loss.backward()
            return {"saved": sum(saved.values()), "forward": forward, "peak": live.peak_bytes}


HIDDEN, WEIGHT = TOKENS * SIZE, VOCAB * SIZE
# name -> (arguments, saved bytes, bytes of the forward) by the docstring of the module
CLAIMS: dict[str, tuple[dict[str, Any], int, int]] = {
    "fp32": ({}, 4 * (HIDDEN + WEIGHT), 4 * (CHUNK * VOCAB + HIDDEN + WEIGHT)),
    "fp32 soft-capped": (
        {"softcap": 5.0},
        4 * (HIDDEN + WEIGHT),
        4 * (CHUNK * VOCAB + HIDDEN + WEIGHT + BLOCK),
    ),
    "bf16": (
        {"dtype": torch.bfloat16},
        2 * (HIDDEN + WEIGHT),
        2 * (CHUNK * VOCAB + HIDDEN) + 4 * (WEIGHT + BLOCK),
    ),
    "bf16 summed in bf16, soft-capped": (
        {"dtype": torch.bfloat16, "accumulate": "weight", "softcap": 5.0},
        2 * (HIDDEN + WEIGHT),
        2 * (CHUNK * VOCAB + HIDDEN + WEIGHT) + 2 * 4 * BLOCK,
    ),
    "autocast": (
        {"autocast": True},
        2 * HIDDEN + 4 * WEIGHT,
        # ... and the cast rows of H of one chunk
        2 * (CHUNK * VOCAB + CHUNK * SIZE + HIDDEN + WEIGHT) + 4 * (WEIGHT + BLOCK),
    ),
    "frozen head": ({"frozen": (1,)}, 4 * HIDDEN, 4 * (CHUNK * VOCAB + HIDDEN)),
    "frozen body": ({"frozen": (0,)}, 4 * WEIGHT, 4 * (CHUNK * VOCAB + WEIGHT)),
}
SMALL = 16 * TOKENS + 32 * CHUNK  # masks, scales and row sums


@pytest.mark.parametrize(("options", "saved", "forward"), CLAIMS.values(), ids=CLAIMS.keys())
def test_bytes_are_those_of_the_docstring_real_and_fake(
    options: dict[str, Any], saved: int, forward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", BLOCK)
    real, fake = bytes_run(**options), bytes_run(**options, fake=True)
    assert real["saved"] == saved
    assert forward <= real["forward"] <= forward + SMALL
    # The backward hands the same storages on: at most dH leaves the dtype of the product.
    assert real["peak"] <= forward + SMALL
    assert real == fake


def test_plain_pytorch_needs_more_by_this_measure() -> None:
    hidden, weight, labels = inputs()
    with LiveBytes([hidden, weight, labels]) as live:
        plain_loss(hidden, weight, labels).backward()
    assert live.peak_bytes >= 2 * 4 * TOKENS * VOCAB
    assert live.peak_bytes > 3 * bytes_run()["peak"]


def test_nothing_is_kept_without_gradients() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad(), LiveBytes([hidden, weight, labels]) as live:
        loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=CHUNK)
        assert live.live_bytes <= 16
    assert live.peak_bytes <= 4 * CHUNK * VOCAB + SMALL
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss(hidden, weight, labels).detach())
    frozen = linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    assert not frozen.requires_grad


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen: int) -> None:
    hidden, weight, labels = inputs()
    (hidden, weight)[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=CHUNK).backward()
    ours, other = ((weight, hidden), (hidden, weight))[frozen]
    assert other.grad is None
    kept = ours.grad
    ours.grad = None
    plain_loss(hidden, weight, labels).backward()
    torch.testing.assert_close(kept, ours.grad, rtol=1e-5, atol=1e-8)


def test_non_contiguous_inputs() -> None:
    hidden, weight, labels = inputs()
    strided = hidden.detach().t().contiguous().t().requires_grad_()
    head = weight.detach().t().contiguous().t().requires_grad_()
    every_other = torch.stack([labels, labels], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert not every_other.is_contiguous()
    for upstream in (1.0, 0.5):
        ours = linear_cross_entropy(strided, head, every_other, chunk_tokens=CHUNK)
        ours.backward(torch.tensor(upstream))
        plain_loss(hidden, weight, labels).backward(torch.tensor(upstream))
    torch.testing.assert_close(strided.grad, hidden.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(head.grad, weight.grad, rtol=1e-5, atol=1e-8)


def test_accumulation_over_two_calls_with_the_count_of_both() -> None:
    hidden, weight, labels = inputs()
    items = (labels != -100).sum()
    plain_loss(hidden, weight, labels).backward()
    expected, weight.grad = weight.grad, None
    for half in (slice(0, 100), slice(100, None)):
        linear_cross_entropy(
            hidden[half], weight, labels[half], num_items=items, chunk_tokens=CHUNK
        ).backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-8)


def test_a_head_tied_to_the_embedding_sums_both_uses() -> None:
    _, weight, labels = inputs()
    words = torch.arange(TOKENS)
    grads = []
    for loss in (plain_loss, linear_cross_entropy):
        head: Callable[..., Tensor] = loss
        weight.grad = None
        head(functional.embedding(words, weight).tanh(), weight, labels).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_and_rounds_as_linear_does(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    functional.cross_entropy(functional.linear(*exact), labels).backward()
    errors = []
    for head in (plain_loss, linear_cross_entropy):
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", dtype=dtype):
            loss = head(hidden, weight, labels)
        assert loss.dtype == torch.float32
        loss.backward()
        for tensor, truth in zip((hidden, weight), exact, strict=True):
            assert tensor.grad is not None
            assert truth.grad is not None
            assert tensor.grad.dtype == torch.float32
            errors.append(float((tensor.grad - truth.grad).norm() / truth.grad.norm()))
    assert errors[2] <= 2 * errors[0]
    assert errors[3] <= 2 * errors[1]
    assert errors[0] > 1e-4  # it did run in low precision


def test_float16_probabilities_survive_the_division_by_many_tokens() -> None:
    """With N = 2**20 most of dZ is below float16's least number, but for the scaler's 2**16."""
    hidden, weight, labels = inputs()
    weight.data *= 0.05
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = functional.cross_entropy(functional.linear(*exact), labels, reduction="sum")
    (truth / 2**20 * 2**16).backward()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden, weight, labels, num_items=2**20, chunk_tokens=CHUNK)
    (loss * 2**16).backward()
    for tensor, reference in zip((hidden, weight), exact, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        difference = (tensor.grad - reference.grad).norm() / reference.grad.norm()
        assert difference < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_upstream_gradient_is_applied_in_fp32_and_without_a_copy(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=CHUNK)
    saved = [x for x in loss.grad_fn.saved_tensors if x is not None]  # type: ignore[union-attr]
    expected = [(x.float() * (1 / 3)).to(dtype) for x in saved]
    pointers = [x.data_ptr() for x in saved]
    del saved
    (loss * (1 / 3)).backward()
    for tensor, value, pointer in zip((hidden, weight), expected, pointers, strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, value)
        assert tensor.grad.data_ptr() == pointer


def test_a_retained_graph_gives_the_same_gradient_again() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=CHUNK)
    first = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 3, (hidden, weight))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_under_checkpointing() -> None:
    hidden, weight, labels = inputs()
    linear_cross_entropy(hidden, weight, labels).backward()
    expected, hidden.grad = hidden.grad, None
    loss = checkpoint(linear_cross_entropy, hidden, weight, labels, use_reentrant=False)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert hidden.grad is not None
    assert expected is not None
    assert torch.equal(hidden.grad, expected)
