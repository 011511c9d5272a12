"""Fake results that are made again are those that FakeTensorMode computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memrt.profiling import fake_results
from memrt.profiling.fake import fake_tensors
from memrt.profiling.fake_results import fake_result

OPERATORS: dict[str, Callable[[Tensor], Any]] = {
    "new": lambda x: x.mul(2),
    "new, of two": lambda x: torch.mm(x, x.t()),
    "keyword": lambda x: x.sum(dim=0, dtype=torch.float64),
    "strides that are not in order": lambda x: x.t().mul(2),
    "view": lambda x: x.view(3, 2, 2),
    "view that begins inside": lambda x: x[1:, 1:].t(),
    "view of stride 0": lambda x: x[:1].expand(5, 4),
    "view that no schema names": lambda x: torch.ops.aten._unsafe_view(x, [12]),
    "the same, with strides": lambda x: x.detach(),
    "list of tensors": lambda x: torch.cat([x, x], dim=1),
    "several results": lambda x: x.split(1),
    "in place": lambda x: x.add_(1),
    "in place, of a view": lambda x: x[1].add_(1),
    "to another dtype": lambda x: x.to(torch.bfloat16),
    "number": lambda x: x + 1.5,
    "factory": lambda x: torch.zeros(3) + x.sum(),
    "complex": lambda x: torch.complex(x, x).conj() * 2,
    "a tensor of known value": lambda x: x * torch.tensor(2.0),
}


class _Remembering(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return fake_result(func, args, kwargs or {})


@contextmanager
def remembering() -> Iterator[FakeTensorMode]:
    with fake_tensors() as mode, _Remembering():
        yield mode


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(fake_results, "_RESULTS", known)
    return known


def described(result: Any, source: Tensor) -> Any:
    if isinstance(result, (list, tuple)):
        return [described(each, source) for each in result]
    assert isinstance(result, FakeTensor)
    storage = result.untyped_storage()
    return (
        (result.shape, result.stride(), result.storage_offset(), result.dtype, result.device),
        (storage.nbytes(), storage._cdata == source.untyped_storage()._cdata),
        (result._version - source._version, result.is_conj(), result._is_view()),
    )


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_what_is_made_again_is_what_was_computed(operator: Callable[[Tensor], Any]) -> None:
    with fake_tensors():
        source = torch.empty(3, 4)
        expected = described(operator(source), source)
    with remembering():
        for _ in range(3):
            source = torch.empty(3, 4)
            assert described(operator(source), source) == expected


def test_every_result_is_a_tensor_of_its_own(nothing_known: dict[Any, Any]) -> None:
    with remembering():
        source = torch.empty(3, 4)
        first, second = source * 2, source * 2
        assert first is not second
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
        assert len(nothing_known) == 1


def test_what_a_result_depends_on_tells_it_apart(nothing_known: dict[Any, Any]) -> None:
    with remembering():
        integers = torch.empty(3, dtype=torch.uint8)
        assert (integers * 1).dtype is torch.uint8
        assert (integers * 1.0).dtype is torch.float32
        assert (integers * True).dtype is torch.uint8
        torch.set_default_dtype(torch.float64)
        try:
            assert (integers * 1.0).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        wide = torch.empty(4, 6)
        assert wide[:2].detach().storage_offset() == 0
        assert wide[2:].detach().storage_offset() == 12


def test_gradients_are_those_of_the_shapes() -> None:
    with remembering():
        for _ in range(2):
            weight = torch.empty(4, 3, requires_grad=True)
            torch.empty(2, 4).mm(weight).relu().sum().backward()
            assert weight.grad is not None
            assert weight.grad.shape == (4, 3)


def test_real_arguments_are_asked_each_time(nothing_known: dict[Any, Any]) -> None:
    real = torch.tensor([0, 1, 1])
    with remembering():
        assert torch.empty(2, 3).index_select(0, real).shape == (3, 3)
    assert not nothing_known
