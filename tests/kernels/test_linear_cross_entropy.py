"""Values and gradients of the chunked head against float64 and against plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels import mixed_precision
from memrt.kernels.linear_cross_entropy import linear_cross_entropy

IGNORE = -100


@dataclass
class Case:
    """Inputs of one call; plain() is what PyTorch's own operators make of them."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    num_items: int | Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def to(self, dtype: torch.dtype) -> Case:
        return Case(
            hidden=self.hidden.detach().to(dtype).requires_grad_(self.hidden.requires_grad),
            weight=self.weight.detach().to(dtype).requires_grad_(self.weight.requires_grad),
            bias=None if self.bias is None else self.bias.detach().to(dtype).requires_grad_(),
            labels=self.labels,
            num_items=self.num_items,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
        )

    def plain(self) -> Tensor:
        logits = functional.linear(self.hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.num_items is None:
            return functional.cross_entropy(logits, self.labels, ignore_index=IGNORE)
        total = functional.cross_entropy(logits, self.labels, ignore_index=IGNORE, reduction="sum")
        return total / self.num_items

    def chunked(self, **settings: Any) -> Tensor:
        return linear_cross_entropy(
            self.hidden,
            self.weight,
            self.labels,
            bias=self.bias,
            num_items=self.num_items,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            **settings,
        )

    def gradients(self) -> list[Tensor]:
        leaves = [x for x in (self.hidden, self.weight, self.bias) if x is not None]
        return [x.grad for x in leaves if x.grad is not None]


def make(
    tokens: int = 67,
    size: int = 24,
    vocab: int = 101,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(tokens * 1009 + vocab)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size, generator=generator).to(dtype).requires_grad_()
    offsets = torch.randn(vocab, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    # Uneven over chunks: all of the first tokens, then one in three.
    labels[: tokens // 4] = IGNORE
    labels[tokens // 4 :: 3] = IGNORE
    return Case(hidden, weight, labels, bias=offsets if bias else None, **options)


def error(value: Tensor, truth: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm().clamp(min=torch.finfo(torch.float64).tiny))


def check_against_plain(case: Case, **settings: Any) -> None:
    """Hold loss and gradients to twice the error that plain PyTorch makes in the same dtype."""
    dtype = case.hidden.dtype
    truth, plain, chunked = case.to(torch.float64), case.to(dtype), case.to(dtype)
    losses = [truth.plain(), plain.plain(), chunked.chunked(**settings)]
    for loss in losses:
        loss.backward()
    # One rounding of the fp32 loss: plain may be right to the last bit by luck.
    slack = 2 * torch.finfo(losses[2].dtype).eps
    assert losses[2].dtype == losses[1].dtype
    assert error(losses[2], losses[0]) <= 2 * error(losses[1], losses[0]) + slack
    grads = zip(chunked.gradients(), plain.gradients(), truth.gradients(), strict=True)
    for ours, theirs, exact in grads:
        assert ours.dtype == dtype
        # The same one rounding, of the dtype in which the gradient is kept.
        assert error(ours, exact) <= 2 * error(theirs, exact) + torch.finfo(dtype).eps / 2


CASES = {
    "uneven masks, ragged last chunk": {},
    "fewer tokens than a chunk": {"tokens": 5},
    "one token": {"tokens": 1, "vocab": 7},
    "many chunks": {"tokens": 200},
    "64 chunks": {"tokens": 1024, "vocab": 32},
    "vocab 1": {"vocab": 1},
    "hidden 1": {"size": 1},
    "bias": {"bias": True},
    "num_items": {"num_items": 31},
    "num_items tensor": {"num_items": torch.tensor(31)},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.0625},
    "all together": {"softcap": 5.0, "logit_scale": 0.25, "bias": True, "num_items": 1000},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_error_is_at_most_twice_that_of_plain_pytorch(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of a few rows and tiles of a few words, as a real vocabulary has.
    monkeypatch.setattr(mixed_precision, "BLOCK_ELEMENTS", 300)
    case = make(**options, dtype=dtype)
    if case.labels.numel() == 1:
        case.labels.fill_(3)
    check_against_plain(case, chunk_tokens=16)


def test_weight_accumulation_rounds_once_per_chunk() -> None:
    case, truth = make(512, dtype=torch.bfloat16), make(512, dtype=torch.bfloat16)
    truth = truth.to(torch.float64)
    truth.plain().backward()
    case.chunked(chunk_tokens=128, accumulate="weight").backward()
    assert case.weight.grad is not None
    assert truth.weight.grad is not None
    # Each of 4 chunks rounds its dZ and the running sum: half an eps each, added up.
    assert error(case.weight.grad, truth.weight.grad) <= 4 * torch.finfo(torch.bfloat16).eps


def test_the_same_gradient_whatever_the_chunks() -> None:
    whole, split = make().to(torch.float64), make().to(torch.float64)
    first, second = whole.chunked(chunk_tokens=1024), split.chunked(chunk_tokens=3)
    first.backward()
    second.backward()
    assert torch.allclose(first, second, rtol=1e-14)
    for ours, theirs in zip(whole.gradients(), split.gradients(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_items", [None, 5])
def test_gradcheck(bias: bool, softcap: float | None, num_items: int | None) -> None:
    case = make(7, 4, 6, dtype=torch.float64, bias=bias, softcap=softcap, num_items=num_items)
    leaves = [x for x in (case.hidden, case.weight, case.bias) if x is not None]

    def loss(*inputs: Tensor) -> Tensor:
        case.hidden, case.weight = inputs[:2]
        case.bias = inputs[2] if bias else None
        case.logit_scale = 0.7
        return case.chunked(chunk_tokens=3)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_batch_without_any_label(dtype: torch.dtype) -> None:
    for num_items, expected in ((None, float("nan")), (7, 0.0), (torch.tensor(7), 0.0)):
        case = make(dtype=dtype, num_items=num_items)
        case.labels.fill_(IGNORE)
        plain = case.to(dtype)
        loss, plain_loss = case.chunked(chunk_tokens=16), plain.plain()
        loss.backward()
        plain_loss.backward()
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(loss, plain_loss, equal_nan=True, rtol=0, atol=0)
        for ours, theirs in zip(case.gradients(), plain.gradients(), strict=True):
            assert torch.equal(ours, theirs)
            assert not ours.any()


def test_no_tokens_at_all() -> None:
    case = make()
    hidden = case.hidden[:0].detach().requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels[:0], num_items=3)
    loss.backward()
    assert loss.item() == 0.0
    assert case.weight.grad is not None
    assert not case.weight.grad.any()
    assert linear_cross_entropy(hidden, case.weight, case.labels[:0]).isnan()


def test_another_ignore_index() -> None:
    case = make()
    labels = torch.where(case.labels == IGNORE, torch.tensor(3), case.labels)
    loss = linear_cross_entropy(case.hidden, case.weight, labels, ignore_index=3, chunk_tokens=16)
    plain = functional.cross_entropy(case.hidden @ case.weight.T, labels, ignore_index=3)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(loss, case.weight)[0]
    torch.testing.assert_close(
        ours, torch.autograd.grad(plain, case.weight)[0], rtol=1e-5, atol=1e-7
    )


def test_minus_infinity_is_probability_zero() -> None:
    case = make(bias=True)
    assert case.bias is not None
    allowed = case.labels[case.labels != IGNORE]
    forbidden = next(word for word in range(case.weight.shape[0]) if word not in allowed)
    with torch.no_grad():
        case.bias[forbidden] = float("-inf")
    check_against_plain(case, chunk_tokens=16)
    case.chunked().backward()
    assert case.bias.grad is not None
    assert case.bias.grad[forbidden] == 0.0


@pytest.mark.parametrize("label", [101, 5000, -1])
def test_a_label_outside_the_vocabulary_is_pytorchs_error(label: int) -> None:
    case = make()
    case.labels[40] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        case.plain()
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        case.chunked(chunk_tokens=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"accumulate": "bf16"}, "accumulate is 'bf16'"),
        ({"num_items": 0}, "num_items is 0"),
        ({"num_items": torch.ones(2)}, r"num_items is \(2,\)"),
        ({"bias": torch.ones(3)}, r"bias is \(3,\)"),
        ({"bias": torch.ones(101).half()}, "would multiply in"),
        ({"hidden": torch.ones(2, 3, 24)}, r"hidden is \(2, 3, 24\)"),
        ({"hidden": torch.ones(67, 23)}, r"hidden is \(67, 23\)"),
        ({"labels": torch.zeros(66, dtype=torch.int64)}, r"labels are \(66,\)"),
        ({"labels": torch.zeros(67, dtype=torch.int32)}, "torch.int32"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    case = make()
    given = {"hidden": case.hidden, "weight": case.weight, "labels": case.labels} | arguments
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given)
