"""The Trainer's memory report: a ledger over the first optimizer steps, then a light monitor.

`<output_dir>/memrt/report.json`, `.md` and `.html` are written when the ledger leaves, and again,
with what the monitor saw and the losses, when training ends, however it ends. On CUDA there is a
`snapshot.pickle` of the counted steps beside them, and of the moment where memory ran out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memrt.checkpoint import CheckpointMixin, write_json, write_text
from memrt.monitoring import PhaseMarks
from memrt.profiling.ledger import Ledger
from memrt.profiling.log_values import LogReader
from memrt.profiling.monitor import Monitor
from memrt.profiling.render import to_markdown
from memrt.profiling.render_html import to_html
from memrt.profiling.report import SCHEMA, conditions, timeline_json
from memrt.profiling.snapshot import VIEWER, AllocatorHistory, write_snapshot
from memrt.throughput import Throughput

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["NUM_STEPS", "MemoryReport", "ReportMixin", "losses_of"]

NUM_STEPS = 3
"""The first step makes the optimizer's state, the second is the first that holds all, and a third
shows whether bytes still grow."""

logger = logging.getLogger(__name__)


class MemoryReport:
    """What a run takes: counted for `NUM_STEPS` optimizer steps, watched until it ends.

    The ledger is entered while a step runs: between steps (logging, evaluation, saving) nothing is
    counted. The monitor watches all of it, and tells forward, backward and step apart once the
    ledger is gone. Clipping falls into backward.
    """

    def __init__(self, *, device: torch.device) -> None:
        self.ledger = Ledger(device_type=device.type)
        self.num_counted = 0
        self.has_begun = False
        """Whether a step began, which may be where the run ended."""
        self._device = device
        self._monitor = Monitor(device=device)
        self._marks = PhaseMarks(self._monitor)
        self._history = AllocatorHistory(device)
        self._throughput = Throughput()
        self._counting = ExitStack()
        self._watches = self._in_step = False
        self._phases: list[str] = []  # that are open, the innermost last

    @property
    def counts(self) -> bool:
        """Whether the next step is one to count."""
        return self.num_counted < NUM_STEPS

    def begin_training(self) -> None:
        """Take the monitor's baseline."""
        if not self._watches:
            self._monitor.start()
            self._watches = True
        if self.counts:
            self._history.start()

    def begin_step(self) -> None:
        """An optimizer step begins."""
        self._in_step = self.has_begun = True
        if self.counts:
            self._marks.enter("counted")
            self._counting.enter_context(self.ledger)
        else:
            self._throughput.begin_step()

    def end_step(self) -> bool:
        """An optimizer step is over; whether it was the last one to count."""
        self._in_step = False
        self._counting.close()
        self._marks.enter(None)
        if not self.counts:
            self._throughput.end_step()
            return False
        self.num_counted += 1
        if not self.counts:
            self._history.stop()
        return not self.counts

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Forward and loss of a micro-batch; what follows is its backward."""
        watched = self._in_step and not self.counts
        if watched:
            self._marks.enter("forward")
        yield
        if watched:
            self._marks.enter("backward")

    def begin_micro_batch(self) -> None:
        """Forward and backward, for who is not told where one ends and the other begins."""
        if self._in_step and not self.counts:
            self._marks.enter("forward and backward")

    def begin_update(self) -> None:
        """The optimizer's own step begins."""
        if self._in_step and not self.counts:
            self._marks.enter("step")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What a Trainer does between two steps; in a phase of the same name it is a part of it."""
        if not self._watches or self._in_step or name in self._phases:
            yield
            return
        self._phases.append(name)
        try:
            with self._marks.phase(name):
                yield
        finally:
            self._phases.pop()
            self._throughput.restart()

    def add_tokens(self, inputs: Any) -> None:
        """A micro-batch goes to the model."""
        if self._in_step and not self.counts and isinstance(inputs, Mapping):
            self._throughput.add(inputs)

    def log_values(self) -> dict[str, float]:
        """Memory, power and utilisation of now, for a line of the log."""
        return self._monitor.log_values()

    def close(self) -> None:
        """Leave ledger and monitor, which would otherwise go on after an exception."""
        self._counting.close()
        self._history.stop()
        self._in_step = False
        if self._watches:
            self._marks.enter(None)
            self._monitor.stop()
            self._watches = False

    def write(self, folder: Path, *, history: list[dict[str, Any]], **settings: Any) -> None:
        """Write what is known now; a folder that takes no files costs the report, not the run."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._history.write(folder)
            report = self.to_json(history=history, **settings)
            write_text(folder / "report.md", to_markdown(report))
            write_text(folder / "report.html", to_html(report))
            write_json(folder / "report.json", report)
        except OSError as error:
            logger.warning("the memory report was not written to %s: %s", folder, error)

    def write_out_of_memory(self, folder: Path, *, rank: int) -> None:
        """Save what the allocator held when it ran out of memory."""
        if not self._history.on_cuda:
            return
        try:
            path = write_snapshot(folder, rank=rank)
        except OSError as error:
            logger.warning("the snapshot was not written to %s: %s", folder, error)
            return
        logger.warning("out of memory: %s has what the allocator held; see %s", path, VIEWER)

    def to_json(
        self,
        *,
        history: list[dict[str, Any]],
        steps: int,
        output: str,
        strategies: list[str],
        **settings: Any,
    ) -> dict[str, Any]:
        """The report of kind `train`; `history` is the Trainer's log."""
        losses, evaluations = losses_of(history, "loss"), losses_of(history, "eval_loss")
        return {
            "schema": SCHEMA,
            "kind": "train",
            **timeline_json(self.ledger.timeline),
            "num_counted_steps": self.num_counted,
            "predicted": None,
            "monitor": self._monitor.report().to_json(),
            "tokens_per_second": self._throughput.tokens_per_second,
            "loss": losses[-1]["loss"] if losses else None,
            "losses": losses,
            "evaluation_loss": evaluations[-1]["loss"] if evaluations else None,
            "evaluation_losses": evaluations,
            "steps": steps,
            "resumed_from": None,
            "output": output,
            "data": None,
            "snapshot": self._history.to_json(),
            "conditions": conditions(
                settings={**settings, "allocator_snapshot": str(self._history)},
                strategies=strategies,
                device=str(self._device),
            ),
        }


def losses_of(history: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """`loss` or `eval_loss` of every log with its step; None where it was not finite."""
    return [
        {"step": log["step"], "loss": log[name] if math.isfinite(log[name]) else None}
        for log in history
        if name in log
    ]


class ReportMixin(CheckpointMixin):
    """Tells a memory report what a Trainer is doing."""

    _report: MemoryReport | None = None
    _report_is_due = False
    _log_reader: LogReader | None = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `compute_loss`, which is the forward of a micro-batch."""
        if self._report is None:
            return super().compute_loss(*args, **kwargs)
        with self._report.forward():
            return super().compute_loss(*args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        if self._report is not None:
            self._report.add_tokens(prepared)
        return prepared

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `train`, watched from where it resumes on."""
        report = self._report
        if report is None:
            return super().train(*args, **kwargs)
        report.begin_training()
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            report.close()  # where there was no step, nobody else does
            raise

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' `log`; a line of training says what memory is, for every reporter."""
        if self.session is not None and "loss" in logs:
            logs = {**logs, **self._memory_values()}
        super().log(logs, *args, **kwargs)

    def _memory_values(self) -> dict[str, float]:
        if self._report is not None:
            return self._report.log_values()
        if self._log_reader is None:
            self._log_reader = LogReader(self.args.device)
        return self._log_reader.values()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._phase("resume"):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._phase("resume") if checkpoint else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `evaluate`, a phase of the report."""
        with self._phase("evaluate"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._phase("save"):
            super()._save_checkpoint(*args, **kwargs)

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._report is None else self._report.phase(name)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except torch.OutOfMemoryError:
            if self._report is not None:
                folder = Path(self.args.output_dir) / "memrt"
                self._report.write_out_of_memory(folder, rank=self.args.process_index)
            raise

    def _end_report(self) -> None:
        """However training ended; where no step did, another attempt goes on counting."""
        report = self._report
        if report is None:
            return
        report.close()
        if report.num_counted:
            assert self.session is not None
            self.session.drop_ledger()
            self._report, self._report_is_due = None, False
        if report.has_begun:
            self._write_report(report)

    def _write_report(self, report: MemoryReport) -> None:
        if not self.is_world_process_zero():
            return
        model, args = self._bare_model(), self.args
        report.write(
            Path(args.output_dir) / "memrt",
            history=self.state.log_history,
            steps=self.state.global_step,
            output=str(args.output_dir),
            strategies=[str(strategy) for strategy in self._strategies],
            model=type(model).__name__,
            num_parameters=sum(p.numel() for p in model.parameters()),
            batch_size=self._train_batch_size,
            accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=self.accelerator.mixed_precision,
        )
