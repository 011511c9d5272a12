"""Fake results that were computed before: a model's layers and steps repeat the same operators.

`FakeTensorMode` remembers results too, and takes a third of a fake run's time to describe the
arguments. What a plan meets is simpler: an operator that writes to nothing and returns one tensor,
whose shape, strides and dtype follow from those of fake arguments alone. It is a new one, or a view
of an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

__all__ = ["fake_result"]

_SETTINGS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_VALUES = (int, float, str, type(None), *_SETTINGS)


class _NotDescribedError(Exception):
    """Arguments from which a result cannot be told."""


class _Result(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    view_of: int | None
    """The argument whose storage it lies in; None is one of its own."""


# as FakeTensorMode's own, for as long as the process lives: of built-in operators alone
_RESULTS: dict[tuple[Any, ...], _Result | None] = {}


def fake_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` returns, made anew as the result of arguments like these was once."""
    mode = None
    if _returns_one_tensor(func):
        key: list[Any] = [func, torch.get_default_dtype(), *kwargs]
        try:
            mode = _describe(key, (*args, *kwargs.values()))
        except _NotDescribedError:
            mode = None
    if mode is None:
        return func(*args, **kwargs)
    described = tuple(key)
    if described in _RESULTS:
        known = _RESULTS[described]
        return func(*args, **kwargs) if known is None else _made(mode, known, args)
    result = func(*args, **kwargs)
    _RESULTS[described] = _remembered(mode, result, args, kwargs)
    return result


@cache
def _returns_one_tensor(func: Any) -> bool:
    """Whether a built-in operator has one tensor for a result, and writes to no argument."""
    schema = func._schema
    written = any(value.alias_info and value.alias_info.is_write for value in schema.arguments)
    results = [str(value.type) for value in schema.returns]
    return func.namespace == "aten" and results == ["Tensor"] and not written


def _describe(key: list[Any], values: Iterable[Any]) -> FakeTensorMode | None:
    """Append what a result depends on to `key`; the mode of the values' fake tensors, if any."""
    mode = None
    for value in values:
        if type(value) is FakeTensor:
            if value.constant is not None or not _is_plain(value):
                raise _NotDescribedError
            mode = value.fake_mode
            key += (value.dtype, value.shape, value.stride(), value.storage_offset())
            key.append(value.fake_device)
        elif isinstance(value, (list, tuple)):
            key += (type(value), len(value))
            mode = _describe(key, value) or mode
        elif isinstance(value, _VALUES):
            key += (type(value), value)  # 1 and 1.0 are equal, and give other dtypes
        else:
            raise _NotDescribedError
    return mode


def _is_plain(tensor: Tensor) -> bool:
    """Whether bytes lie as strides say: dense, and not to be conjugated later."""
    return tensor.layout is torch.strided and not tensor.dtype.is_complex


def _made(mode: FakeTensorMode, known: _Result, args: tuple[Any, ...]) -> FakeTensor:
    storage = None if known.view_of is None else args[known.view_of].untyped_storage()
    with in_kernel_invocation_manager(mode):
        if storage is None:
            empty = torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
        else:
            empty = torch.empty(0, dtype=known.dtype, device="meta")
            empty.set_(storage, known.offset, known.shape, known.stride)
    return FakeTensor(mode, empty, known.device)


def _remembered(
    mode: FakeTensorMode, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Result | None:
    """How to make the result again; None where it is more than a tensor of its strides."""
    if type(result) is not FakeTensor or result.constant is not None or not _is_plain(result):
        return None
    storage = result.untyped_storage()
    inside = [index for index, value in enumerate(args) if _lies_in(value, storage)]
    if len(inside) > 1 or any(_lies_in(value, storage) for value in kwargs.values()):
        return None
    known = _Result(
        shape=result.shape,
        stride=result.stride(),
        offset=int(result.storage_offset()),
        dtype=result.dtype,
        device=result.fake_device,
        view_of=inside[0] if inside else None,
    )
    if inside:  # by storage: aten::_unsafe_view is a view whose schema does not say so
        return None if result is args[inside[0]] else known
    own = _made(mode, known, args)
    alike = own.untyped_storage().nbytes() == storage.nbytes() and not known.offset
    return known if alike else None


def _lies_in(value: Any, storage: torch.UntypedStorage) -> bool:
    """Whether a tensor, or one of a list, lies in a storage."""
    if isinstance(value, (list, tuple)):
        return any(_lies_in(each, storage) for each in value)
    return isinstance(value, Tensor) and value.untyped_storage()._cdata == storage._cdata
