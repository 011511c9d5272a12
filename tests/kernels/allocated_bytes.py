"""What the CPU's allocator gave out while a call ran, scratch of compiled code included."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated_peak(call: Callable[[], object]) -> int:
    """The most bytes that were out at once, above those at the start, by torch's profiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as seen:
            call()
    found = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns())
    assert changes, "the profiler saw no allocation"
    alive = peak = 0
    for change in changes:
        alive += change.nbytes()
        peak = max(peak, alive)
    return peak
