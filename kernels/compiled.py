"""torch.compile for what operators compute on the CPU, with a way out that is seen.

Eager PyTorch makes a pass over memory for each operation, and a fused optimizer step has hundreds
of them. Compiled, the same function is a few loops: 8 times faster for the FP8 step (2^18 elements
on one AVX-512 core, torch 2.13: 5.6 ms for 47 ms). It takes a C++ compiler and time, once (28 to
40 s for the FP8 step on one core, nearly all of it GCC's), so operators compile from a size on, and
call the function itself below it.

Inductor has a float's bits read through memory, in a loop that the compiler makes vectors of. Tuned
for an Intel processor with AVX-512, it makes them 256 bits wide, and the 512 bits that are loaded
then wait until both halves have left the store buffer, two dozen times for 16 elements of the FP8
step. For the plain architecture they are 512 bits wide: 16 ns an element instead of 45 (Sapphire
Rapids, one core, GCC 12).

The call is made inside a custom operator: no dispatch mode sees it, and under fake tensors the
operator's body, and with it the compiler, does not run.

Every combination of shapes and dtypes is compiled on its own. The compiler gives up after
`recompile_limit` (8) of them, which three sizes of pieces in three dtypes exceed; it is told of
more while it compiles, and the user's own limit stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["CompiledFunction", "is_whole_piece"]

AVX512 = "x86-64-v4"

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
            self._compiled = torch.compile(
                self._function, dynamic=False, fullgraph=True, options=compiler_options()
            )
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


def is_whole_piece(rows: slice, whole: int, *matrices: Tensor, at_least: int) -> bool:
    """Whether rows of dense matrices on the CPU are a whole piece, and compiling for it pays.

    whole: rows of such a piece. at_least: elements of a matrix for which it does.
    """
    dense = all(matrix.is_contiguous() and matrix.device.type == "cpu" for matrix in matrices)
    return dense and rows.stop - rows.start == whole and matrices[0].numel() >= at_least


def compiler_options() -> dict[str, Any]:
    """Of `torch.compile`: the architecture, where the usual one has half as wide vectors."""
    import torch._inductor.config as inductor

    named = getattr(inductor.cpp, "march", "unknown to this torch")  # None: nobody named one
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or named is not None:
        return {}
    return {"cpp.march": AVX512} if _compiler_knows(AVX512) else {}


@cache
def _compiler_knows(architecture: str) -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        command = [get_cpp_compiler(), f"-march={architecture}", "-E", "-x", "c++", os.devnull]
        return not subprocess.run(command, capture_output=True, check=False).returncode
    except (InvalidCxxCompiler, OSError):
        return False  # told of when something is compiled


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
