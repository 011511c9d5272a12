"""Exit codes of the suite's parts, for those that run them too; imports nothing."""

from __future__ import annotations

__all__ = ["DEVICE_LOST", "NO_DEVICE"]

NO_DEVICE = 3
"""There is no CUDA device to run on."""

DEVICE_LOST = 70
"""The CUDA context is gone; another process can go on with the next case."""
