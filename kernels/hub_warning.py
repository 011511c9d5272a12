"""Importing bitsandbytes, or PEFT and transformers.Trainer, which import it, without its warning.

On the CPU, bitsandbytes 0.50 looks for a kernel on a hub and warns that it has none. It is the
first line that a user would read, and it tells of nothing that memrt uses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_hub_warning"]


@contextmanager
def without_hub_warning() -> Iterator[None]:
    """What is imported inside is not heard of kernels on a hub; errors are."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
