"""Fake tensors that follow the path of real ones: shapes and bytes without memory or work.

Under `FakeTensorMode` alone, models take another path: transformers treats fake tensors as tracing
and keeps masks that a real run drops, because a fake mask has no values to look at. So integer and
boolean arithmetic runs for real inside the fake run (ids, masks, positions and labels are small),
float work stays fake, and peak and accounts come out equal to the byte.

What a mixture of experts makes of its tokens depends on values that no fake run has. So the experts
that a router picks are named here, as real integers, whatever the model then does with them: all
experts equally often (`"balanced"`), or each once and then the same few for all tokens (`"worst"`:
an expert that no token goes to costs nothing, so the worst is not that all tokens are alike).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from memrt.profiling.fake_results import fake_result

__all__ = [
    "IntegersForReal",
    "NotPlannableError",
    "Routing",
    "fake_floats",
    "fake_initialisers",
    "fake_tensors",
    "is_fake",
    "real_integers",
    "real_tensors",
]

Routing = Literal["balanced", "worst"]

# Above this many elements integer work stays fake too: 2^24 int64 are 128 MiB of host memory.
_MAX_REAL_ELEMENTS = 1 << 24

# What ids, positions, labels and masks are made of. Bytes (uint8) are codes of quantised tensors.
_REAL_DTYPES = frozenset({torch.bool, torch.int16, torch.int32, torch.int64})

_BY_MASK = frozenset({"aten::index", "aten::index_put", "aten::index_put_"})

_INTEGER_FACTORIES = frozenset({"aten::arange", "aten::randint"})

# A decoder that is given no mask makes one of ones, in floats, and reads its values as booleans.
_CONSTANTS = {"aten::ones": 1, "aten::ones_like": 1, "aten::new_ones": 1, "aten::zeros": 0}

_DRAWS = frozenset({"aten::rand", "aten::rand_like"})  # from 0 to below 1


class NotPlannableError(ValueError):
    """What a model runs depends on values, which fake tensors do not have. It may train as well."""


class _Constant(NamedTuple):
    """A fake tensor of one known value, until somebody writes to it."""

    value: int
    version: int


def _is_small_integer(tensor: Tensor) -> bool:
    return tensor.dtype in _REAL_DTYPES and tensor.numel() <= _MAX_REAL_ELEMENTS


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class IntegersForReal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators on real integer and boolean tensors for real, below a fake mode."""

    def __init__(self, routing: Routing) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.routing = routing
        self.routed = False
        """Whether a model picked something by value, as a router picks its experts."""
        self._constants: MutableMapping[Tensor, _Constant] = WeakIdKeyDictionary()
        self._draws: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        """Fake draws, and their versions: none is below 0, which is how LayerDrop is off."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _BY_MASK:
            args = (args[0], _places(args[1]), *args[2:])
        if self._runs_for_real(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func._schema.name == "aten::topk" and _is_router(*args, **kwargs):
            self.routed = True
            values, _ = func(*args, **kwargs)
            return values, _picks(values.shape, args[0].shape[-1], self.routing)
        if func._schema.name == "aten::_grouped_mm" and args[0].dtype != torch.bfloat16:
            return _grouped_mm(*args, **kwargs)
        if func._schema.name == "aten::_to_copy" and kwargs.get("dtype") in _REAL_DTYPES:
            return self._cast(func, args[0], kwargs)
        if func is torch.ops.aten.lt.Scalar and args[1] <= 0 and self._is_draw(args[0]):
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=torch.bool)
        result = fake_result(func, args, kwargs)
        if isinstance(result, FakeTensor):
            self._note(func._schema.name, result)
        return result

    def _note(self, name: str, result: Tensor) -> None:
        """Remember what is known of a fake tensor's values."""
        if name in _CONSTANTS:
            self._constants[result] = _Constant(_CONSTANTS[name], result._version)
        elif name in _DRAWS:
            self._draws[result] = result._version

    def _is_draw(self, tensor: Tensor) -> bool:
        small = tensor.numel() <= _MAX_REAL_ELEMENTS
        return small and self._draws.get(tensor) == tensor._version

    def _cast(self, func: Any, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A fake tensor as integers or booleans: real ones where its values are known."""
        known = self._constants.get(tensor)
        if known is None or known.version != tensor._version or tensor.numel() > _MAX_REAL_ELEMENTS:
            copied: Tensor = func(tensor, **kwargs)
            return copied
        with unset_fake_temporarily():
            return torch.full(tuple(tensor.shape), known.value, dtype=kwargs["dtype"])

    def _runs_for_real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        tensors = list(_tensors((*args, *kwargs.values())))
        if tensors:
            return not any(isinstance(t, FakeTensor) for t in tensors) and all(
                _is_small_integer(t) for t in tensors
            )
        dtype = kwargs.get("dtype")
        if dtype is None:
            return func._schema.name in _INTEGER_FACTORIES and all(
                not isinstance(value, float) for value in args
            )
        sizes = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        return dtype in _REAL_DTYPES and math.prod(sizes) <= _MAX_REAL_ELEMENTS


def _places(indices: Any) -> Any:
    """Real masks among indices as the places that they pick, whose number a fake run can know."""
    found: list[Any] = []
    with unset_fake_temporarily():
        for each in indices:
            is_mask = isinstance(each, Tensor) and each.dtype is torch.bool
            if is_mask and not isinstance(each, FakeTensor):
                found += each.nonzero().unbind(1)
            else:
                found.append(each)
    return found


def _is_router(
    scores: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> bool:
    """Whether a top-k picks from the last dimension of fake scores [..., experts]."""
    return isinstance(scores, FakeTensor) and scores.ndim > 1 and dim in (-1, scores.ndim - 1)


def _picks(shape: torch.Size, num_choices: int, routing: Routing) -> Tensor:
    """Real indices [..., k] of what every token picks of `num_choices`; never one thing twice."""
    with unset_fake_temporarily():
        picked = torch.arange(math.prod(shape)) % num_choices
        if routing == "worst":
            again = picked[num_choices:]  # none where there are fewer picks than choices
            again.copy_(torch.arange(again.numel()) % shape[-1])
        return picked.view(shape)


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor | None = None, **_: Any) -> Tensor:
    """What aten::_grouped_mm returns; torch's own fake of it knows bf16 only (torch 2.13)."""
    size = [a.shape[-2], b.shape[-1]]
    if a.ndim == b.ndim:
        groups = a.shape[0] if a.ndim == 3 or offsets is None else offsets.shape[0]
        size = [groups, *size]
    return torch.empty(size, dtype=a.dtype, device=a.device)


class _Initialisers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers whether any fake draw is to be drawn again (`trunc_normal_` asks it): no."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func._schema.name == "aten::_local_scalar_dense" and args[0].dtype is torch.bool:
            return False if isinstance(args[0], FakeTensor) else func(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_initialisers() -> Iterator[None]:
    """Inside `fake_tensors`, while a model is built: initialisers that look at their draws work."""
    with _Initialisers():  # type: ignore[no-untyped-call]
        yield


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Inside, models and optimizers are built and run on fake CPU tensors.

    `NotPlannableError` where what runs depends on values, which they do not have.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise NotPlannableError(
            f"what this model runs depends on values of its tensors ({error.func}), which a plan "
            "does not have; train it without a plan, or count a few real steps with memrt profile"
        ) from error


def fake_floats(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """A batch's tensor inside `fake_tensors`: images become fake once and stay one storage."""
    return mode.from_tensor(value) if value.is_floating_point() else value


@contextmanager
def real_integers(routing: Routing = "balanced") -> Iterator[IntegersForReal]:
    """Inside `fake_tensors`, after the model is built: integer arithmetic runs for real."""
    with IntegersForReal(routing) as mode:
        yield mode


@contextmanager
def real_tensors() -> Iterator[None]:
    """Inside `fake_tensors`, make real tensors for a while (batches of ids)."""
    with unset_fake_temporarily():
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no bytes behind it."""
    return isinstance(tensor, FakeTensor)
