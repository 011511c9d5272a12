"""Fake tensors that follow the path of real ones: shapes and bytes without memory or work.

Under `FakeTensorMode` alone, models take another path: transformers treats fake tensors as tracing
and keeps masks that a real run drops, because a fake mask has no values to look at. So integer and
boolean arithmetic runs for real inside the fake run (ids, masks, positions and labels are small),
float work stays fake, and peak and accounts come out equal to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["fake_tensors", "real_tensors"]

# Above this many elements integer work stays fake too: 2^24 int64 are 128 MiB of host memory.
_MAX_REAL_ELEMENTS = 1 << 24

# What ids, positions, labels and masks are made of. Bytes (uint8) are codes of quantised tensors.
_REAL_DTYPES = frozenset({torch.bool, torch.int16, torch.int32, torch.int64})

_INTEGER_FACTORIES = frozenset({"aten::arange", "aten::randint"})


def _is_small_integer(tensor: Tensor) -> bool:
    return tensor.dtype in _REAL_DTYPES and tensor.numel() <= _MAX_REAL_ELEMENTS


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _IntegersForReal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators on real integer and boolean tensors for real, below a fake mode."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._runs_for_real(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

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


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Inside, models and optimizers are built and run on fake CPU tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@contextmanager
def real_integers() -> Iterator[None]:
    """Inside `fake_tensors`, after the model is built: integer arithmetic runs for real."""
    with _IntegersForReal():  # type: ignore[no-untyped-call]
        yield


@contextmanager
def real_tensors() -> Iterator[None]:
    """Inside `fake_tensors`, make real tensors for a while (batches of ids)."""
    with unset_fake_temporarily():
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no bytes behind it."""
    return isinstance(tensor, FakeTensor)
