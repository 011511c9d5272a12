"""The bytes that a Triton kernel loads and stores, counted lane by lane in Triton's interpreter.

For functions that `call_interpreted` runs, in the process where Triton interprets. Caches are not
modelled: `accesses` are what the kernel asks for, `addresses` what lies behind it, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


@dataclass
class Traffic:
    """Addresses and sizes of every lane that was not masked off."""

    loads: list[tuple[Any, int]] = field(default_factory=list)
    stores: list[tuple[Any, int]] = field(default_factory=list)

    def of(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        """Bytes of accesses to `tensors`, and of the different addresses among them."""
        accesses = addresses = 0
        for lanes in (self.loads, self.stores):
            places = _all(lanes)
            for tensor in tensors:
                start = tensor.data_ptr()
                stop = start + tensor.numel() * tensor.element_size()
                inside = places[(places >= start) & (places < stop)]
                accesses += inside.size
                addresses += np.unique(inside).size
        return accesses, addresses

    def elsewhere(self, tensors: Sequence[Tensor]) -> int:
        """Bytes of the different addresses outside of `tensors`."""
        num_bytes = 0
        for lanes in (self.loads, self.stores):
            places = np.unique(_all(lanes))
            for tensor in tensors:
                start = tensor.data_ptr()
                stop = start + tensor.numel() * tensor.element_size()
                places = places[(places < start) | (places >= stop)]
            num_bytes += places.size
        return num_bytes


def _all(lanes: list[tuple[Any, int]]) -> Any:
    """The address of every byte, as often as it was met."""
    found = [places[:, None] + np.arange(size, dtype=np.uint64) for places, size in lanes]
    return np.concatenate([part.ravel() for part in found]) if found else np.empty(0, np.uint64)


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count while the context is open."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted(into: list[tuple[Any, int]], pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        places = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)]
        into.append((places.ravel().astype(np.uint64), size))

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        noted(found.loads, pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        noted(found.stores, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    try:
        yield found
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
