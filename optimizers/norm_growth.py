"""The norm-growth limiter: a step may be at most 1 % larger than the one before it.

With n_t the norm of what is to be applied and l_t what was let through:

    l_t = min(n_t, growth · l_{t-1}),   factor = l_t / n_t        (l_0 = n_0: the first is free)

Everything is 0-dim tensors on the weight's device: nothing waits for it. A norm of zero, as of a
step in which the gradient was zero, is let through and not remembered: else the steps after it
would start again from zero, by 1 % a step.

Bytes: 4. Source: Fira (arXiv 2410.01623), and APOLLO (arXiv 2412.05270), growth = 1.01 in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NormGrowthLimiter"]


class NormGrowthLimiter:
    """The limiter of one weight. ``growth=None`` lets everything through and remembers nothing."""

    def __init__(self, growth: float | None) -> None:
        if growth is not None and not growth > 1.0:
            raise ValueError(f"growth is {growth}: give a number above 1, or None for no limit")
        self._growth = growth
        self._last: Tensor | None = None  # 0-dim

    def factor(self, norm: Tensor) -> Tensor:
        """What to multiply a step of this norm (0-dim fp32) by."""
        if self._growth is None:
            return torch.ones_like(norm)
        last = torch.zeros_like(norm) if self._last is None else self._last
        limit = last * self._growth
        limited = torch.where((last > 0.0) & (norm > limit), limit, norm)
        seen = norm > 0.0
        remembered = torch.where(seen, limited, last)
        self._last = remembered if self._last is None else self._last.copy_(remembered)
        return torch.where(seen, limited / norm, 1.0)

    def forget(self) -> None:
        """Let the next step through whatever its norm."""
        self._last = None

    def tensors(self) -> dict[str, Tensor]:
        """The last norm, once there is one."""
        return {} if self._last is None else {"norm": self._last}

    def relocate(self, move: Callable[[Tensor], Tensor]) -> None:
        """Take `move` of the last norm in its place."""
        self._last = None if self._last is None else move(self._last)

    def load(self, tensors: dict[str, Tensor], *, device: torch.device) -> None:
        """Take what ``tensors`` gave."""
        saved = tensors.get("norm")
        if saved is not None and saved.shape != ():
            raise ValueError(f"the saved norm is {tuple(saved.shape)}, not a single number")
        self._last = None if saved is None else saved.to(device, torch.float32, copy=True)
