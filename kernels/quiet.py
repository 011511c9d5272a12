"""Quieting what a user should not read: a logger's warnings, for a while."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

__all__ = ["errors_only", "without_hub_warning"]


@contextmanager
def errors_only(logger: str) -> Iterator[None]:
    """While entered, the logger of this name tells of errors alone."""
    quieted = logging.getLogger(logger)
    before = quieted.level
    quieted.setLevel(logging.ERROR)
    try:
        yield
    finally:
        quieted.setLevel(before)


def without_hub_warning() -> AbstractContextManager[None]:
    """For importing bitsandbytes, or PEFT and transformers.Trainer, which import it.

    On the CPU, bitsandbytes 0.50 looks for a kernel on a hub and warns that it has none. It is the
    first line that a user would read, and it tells of nothing that memrt uses. Where it is imported
    already there is nothing to quiet: operators ask for it at every call.
    """
    if "bitsandbytes" in sys.modules:
        return nullcontext()
    return errors_only("bitsandbytes.backends.cpu.ops")
