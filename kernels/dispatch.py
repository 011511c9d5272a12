"""Which implementation of an operator runs: Triton's, or the reference in PyTorch.

Triton takes CUDA tensors, and CPU tensors under `TRITON_INTERPRET=1`, which runs its kernels in
NumPy, one program after the other: for tests. Everything else takes the reference.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

__all__ = ["is_interpreting", "require_triton", "uses_triton"]


def is_interpreting() -> bool:
    """Whether Triton kernels are interpreted; Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(tensor: Tensor) -> bool:
    """The one rule of dispatch, for every operator with a Triton kernel."""
    return tensor.is_cuda or is_interpreting()


def require_triton(*tensors: Tensor) -> None:
    """Refuse to launch a Triton kernel where it cannot run."""
    if find_spec("triton") is None:
        raise ImportError(
            "Triton computes this operator on CUDA devices and is not installed; run: pip install "
            "triton, or take a strategy that does not need it"
        )
    for tensor in tensors:
        if not tensor.is_cuda and not is_interpreting():
            raise ValueError(
                f"a Triton kernel got a tensor on {tensor.device}: give CUDA tensors, or set "
                "TRITON_INTERPRET=1 before Python starts"
            )
