"""Exit codes of the suite's parts, for those that run them too; imports nothing."""

from __future__ import annotations

__all__ = ["DEVICE_LOST", "NO_DEVICE", "TIMED_OUT"]

NO_DEVICE = 3
"""There is no CUDA device to run on."""

DEVICE_LOST = 70
"""The CUDA context is gone; another process can go on with the next case."""

TIMED_OUT = 71
"""A case took longer than it may; another process can go on with the next."""
