"""Progress on stderr: bars on a terminal, one line a task elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress"]


class Progress:
    """Tasks that run one after the other."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """A line."""
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, name: str, *, num_steps: int) -> Iterator[Callable[[], None]]:
        """A task of `num_steps`; yields what to call after each of them."""
        began = time.perf_counter()
        if not self._is_terminal:
            yield lambda: None
            self.say(f"{name}: {num_steps} steps, {time.perf_counter() - began:.1f} s")
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        with bars:
            task = bars.add_task(name, total=num_steps)
            yield lambda: bars.advance(task)
