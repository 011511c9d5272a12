"""Phase edges of a plain run for the monitor: load, counted, forward, backward, step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from memrt.profiling.monitor import Monitor, MonitorReport
    from memrt.profiling.snapshot import AllocatorHistory
    from memrt.runner import Batch, Run

__all__ = ["PhaseMarks"]


class PhaseMarks:
    """Tells a monitor when the phases of a run begin and end.

    Gradient clipping falls into `backward`: the optimizer's own step begins after it.
    """

    def __init__(self, monitor: Monitor, *, history: AllocatorHistory | None = None) -> None:
        self._monitor = monitor
        self._history = history
        self._open: str | None = None
        self.before_steps: MonitorReport | None = None
        """The monitor's report when the ledger was dropped; energy counts from here."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase around a block."""
        with self._monitor.phase(name):
            yield

    def begin_steps(self, run: Run) -> None:
        """Follow the run's steps from now on; the allocator's history is of those before."""
        if self._history is not None:
            self._history.stop()
        assert run.session.optimizer is not None
        run.session.optimizer.register_step_pre_hook(lambda *_: self.enter("step"))
        loss_of = run.loss_of

        def watched(model: nn.Module, batch: Batch) -> Tensor:
            self.enter("forward")
            loss = loss_of(model, batch)
            self.enter("backward")
            return loss

        run.loss_of = watched
        self.before_steps = self._monitor.report()

    def end_step(self) -> None:
        """An optimizer step is over."""
        self.enter(None)

    def enter(self, name: str | None) -> None:
        """Go from the phase of now to another; None ends it."""
        if name == self._open:
            return
        if self._open is not None:
            self._monitor.end_phase(self._open)
        if name is not None:
            self._monitor.begin_phase(name)
        self._open = name
