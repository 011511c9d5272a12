"""torch.compile for what operators compute on the CPU, with a way out that is seen.

Eager PyTorch makes a pass over memory for each operation, and a fused optimizer step has hundreds
of them. Compiled, the same function is a few loops: 8 times faster for the FP8 step (2^18 elements
on one AVX-512 core, torch 2.13: 5.6 ms for 47 ms). It takes a C++ compiler and some seconds once,
so operators compile from a size on, and call the function itself below it.

The call is made inside a custom operator: no dispatch mode sees it, and under fake tensors the
operator's body, and with it the compiler, does not run.

Every combination of shapes and dtypes is compiled on its own. The compiler gives up after
`recompile_limit` (8) of them, which three sizes of pieces in three dtypes exceed; it is told of
more while it compiles, and the user's own limit stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["CompiledFunction"]

MAX_COMPILED = 64
"""How many combinations of shapes and dtypes a function is compiled for; the next fall back."""


class CompiledFunction:
    """A function of tensors that changes some of them in place; compiled at its first call.

    Where it cannot be compiled (no C++ compiler, say), it warns once and runs nothing.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._compiled: Callable[..., None] | None = None
        self._reason: str | None = None
        self._known: set[tuple[Any, ...]] = set()

    @property
    def fell_back(self) -> bool:
        """Whether it could not be compiled."""
        return self._reason is not None

    def __call__(self, *arguments: Tensor | bool | None) -> bool:
        """Whether it ran; shapes and dtypes that come for the first time are compiled.

        Where it did not, the caller runs the function itself, in pieces as small as it likes.
        """
        if self._reason is not None:
            return False
        if self._compiled is None:
            self._compiled = torch.compile(self._function, dynamic=False, fullgraph=True)
        combination = tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in arguments)
        try:
            if combination in self._known:
                self._compiled(*arguments)
            else:
                with _compiling():
                    self._compiled(*arguments)
                self._known.add(combination)
        except _compiler_errors() as error:  # before anything ran
            cause = getattr(error, "inner_exception", error)
            self._reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
            warnings.warn(
                f"{self._function.__name__} runs uncompiled, and slowly ({self._reason}); "
                "a C++ compiler makes it fast, and CXX names one",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True


@contextmanager
def _compiling() -> Iterator[None]:
    """Room for one more combination, and no warnings of the compiler's own imports."""
    import torch._dynamo as dynamo

    with warnings.catch_warnings(), dynamo.config.patch(recompile_limit=MAX_COMPILED):
        warnings.simplefilter("ignore")
        yield


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    known: Any = (
        BackendCompilerFailed,
        CppCompileError,
        FailOnRecompileLimitHit,
        InvalidCxxCompiler,
    )
    found: tuple[type[Exception], ...] = known
    return found
