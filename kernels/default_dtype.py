"""Calling what makes tensors in torch's default dtype and takes it for fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["float32_by_default"]


@contextmanager
def float32_by_default() -> Iterator[None]:
    """While entered, torch's default dtype is fp32.

    For bitsandbytes 0.50, which makes tables and bounds without a dtype and reads them as fp32:
    while a bf16 model loads, or in a script that sets the default dtype, it would round by others.
    """
    before = torch.get_default_dtype()
    if before is torch.float32:  # as it mostly is: operators enter this at every call
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
