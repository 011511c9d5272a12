"""Safetensors weights under the names that the model gives them, read one tensor at a time.

Files are read with `pread`, not mapped: pages of a mapped file count to the process until the file
is closed (a 256 MiB file, read and dropped tensor by tensor, holds 256 MiB of them at the end), and
a tensor on a map is a view of the whole file. With `pread` a tensor owns its bytes and no more.

Names come from transformers' own rules (renamings, base-model prefix, weight conversions), so that
what loads there loads here. A conversion, such as experts that are saved one by one and fused in
the model, needs its inputs and its output at the same time: while one runs it holds twice the fused
tensor.
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memrt.profiling.fake import is_fake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from memrt.model_source import WeightSource

__all__ = ["Assignment", "WeightFiles", "assign"]

_COMPARE_BYTES = 16 * 2**20

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WeightFiles:
    """Open safetensors files. Close them by leaving the context."""

    def __init__(self, source: WeightSource) -> None:
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        try:
            for path in source.files:
                handle = self._open(path)
                for key in handle.keys():  # noqa: SIM118
                    self._handles[key] = handle
                    self._paths[key] = path
            for key, path in source.index.items():
                if self._paths.get(key) != path:
                    raise ValueError(
                        f"{path}: does not hold {key!r}, though the index says so; "
                        "copy or download the file again"
                    )
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt", backend="pread"))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path}: not a whole safetensors file ({error}); copy or download it again"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def path(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._paths[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self._handles[key].get_slice(key).get_shape())

    def stored_dtype(self, key: str) -> torch.dtype:
        """A tensor's dtype in the file."""
        name = self._handles[key].get_slice(key).get_dtype()
        if name not in _DTYPES:
            raise ValueError(f"{self._paths[key]}: {key!r} has dtype {name}, unknown to torch")
        return _DTYPES[name]

    def common_dtype(self) -> torch.dtype:
        """The dtype of the first weight that a model can compute in (transformers' "auto")."""
        dtypes = (self.stored_dtype(key) for key in self)
        return next((dtype for dtype in dtypes if dtype in _COMPUTE_DTYPES), torch.float32)

    def read(self, key: str) -> Tensor:
        """A tensor with memory of its own; under a fake mode one without."""
        if is_fake(torch.empty(0)):
            return torch.empty(self.shape(key), dtype=self.stored_dtype(key), device="cpu")
        try:
            tensor: Tensor = self._handles[key].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self._paths[key]}: {key!r} cannot be read ({error}); "
                "copy or download the file again"
            ) from error
        return tensor

    def same(self, first: str, second: str, dtype: torch.dtype) -> bool:
        """Whether two tensors are equal once cast to `dtype`; compares 16 MiB at a time."""
        shape = self.shape(first)
        if shape != self.shape(second):
            return False
        if is_fake(torch.empty(0)) or not shape:
            return True
        a, b = (self._handles[key].get_slice(key) for key in (first, second))
        row_bytes = 8 * max(1, torch.Size(shape[1:]).numel())
        rows = max(1, _COMPARE_BYTES // row_bytes)
        parts = [slice(at, min(at + rows, shape[0])) for at in range(0, shape[0], rows)]
        return all(torch.equal(a[part].to(dtype), b[part].to(dtype)) for part in parts)


@dataclass(slots=True, kw_only=True)
class Assignment:
    """Which tensors of the files make which tensors of the model."""

    plain: dict[str, str] = field(default_factory=dict)
    """The model's name -> the file's name."""
    converted: dict[str, Any] = field(default_factory=dict)
    """The model's first name -> transformers' converter, with its inputs still in the files."""
    converted_keys: dict[str, list[str]] = field(default_factory=dict)
    """The model's first name -> the files' names of the converter's inputs."""
    provided: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    used: list[Any] = field(default_factory=list)
    """Transformers' renamings and converters that matched; saving needs them to go back."""


def assign(model: Any, keys: Iterable[str], read: Callable[[str, str], Tensor]) -> Assignment:
    """Match names by transformers' rules; `read(key, name)` gives a tensor as `name` wants it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    result = Assignment()
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # renamed in vain
            name, pattern = rename_source_key(key, [], [], prefix, state)
        names = [name]
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            names += [name.replace(first, other) for other in others]
        if name not in state:
            result.unexpected.update(names)
            continue
        result.provided.update(names)
        if pattern is None:
            result.plain.setdefault(name, key)
        else:
            rule = result.converted.setdefault(name, deepcopy(by_pattern[pattern]))
            rule.add_tensor(name, key, pattern, partial(read, key, name))
            result.converted_keys.setdefault(name, []).append(key)
    result.used = [rule for rule in mapping if rule.was_used()]
    return result
