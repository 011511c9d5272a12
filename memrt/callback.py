"""`MemoryProfilerCallback`: the memory of a run of the stock transformers Trainer.

    trainer = transformers.Trainer(..., callbacks=[memrt.MemoryProfilerCallback()])

The same report as that of `memrt.Trainer(memory_report=True)`, without another Trainer: a ledger
over the first three optimizer steps (about 20 µs an operator), a light monitor over the rest.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from memrt.compose import MARK
from memrt.memory_report import MemoryReport
from memrt.session import Session

__all__ = ["MemoryProfilerCallback", "two_counts"]


class MemoryProfilerCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Counts and watches a training run; changes no number of it.

    A Trainer does not tell its callbacks where forward ends, nor what is in a batch, so that the
    steps after the counted ones are watched as "forward and backward" and "step", and the report
    has no tokens per second.

    Writes `report.md` and `report.json` into `folder`, or into `memrt` inside the Trainer's output
    folder: when the counted steps are over, and again at the end of training. A Trainer tells its
    callbacks nothing of an exception: call `close()` where a process goes on after one, as in a
    notebook (or train again, which closes what was left).
    """

    def __init__(self, *, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._report: MemoryReport | None = None
        self._session: Session | None = None
        self._micro_batch = ExitStack()

    def close(self) -> None:
        """Leave ledger and monitor. Nothing is written."""
        self._micro_batch.close()
        if self._report is not None:
            self._report.close()
        if self._session is not None:
            self._session.detach()
        self._report = self._session = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Training begins: the model and its optimizer are there."""
        _refuse_strategies(args, model)
        if args.n_gpu > 1:
            raise ValueError(
                "MemoryProfilerCallback counts one device, and torch's DataParallel uses "
                f"{args.n_gpu}; show one GPU only (CUDA_VISIBLE_DEVICES=0)"
            )
        self.close()
        self._report = MemoryReport(device=args.device)
        self._session = Session(model, [], ledger=self._report.ledger)
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        if optimizer is not None:
            self._session.adopt_optimizer(optimizer)
        self._report.begin_training()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first micro-batch of an optimizer step begins."""
        if self._report is not None:
            self._report.begin_step()
            self._enter_micro_batch()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A micro-batch is over, and another follows."""
        self._micro_batch.close()
        self._enter_micro_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last micro-batch is over, and its gradients are clipped."""
        self._micro_batch.close()
        if self._report is not None:
            self._report.begin_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step is over."""
        self._micro_batch.close()
        if self._report is None or self._session is None:
            return
        self._session.end_step()
        if self._report.end_step():
            self._session.drop_ledger()
            self._write(args, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training is over."""
        report = self._report
        if report is None:
            return
        report.close()
        if report.num_counted:
            self._write(args, state, kwargs["model"])
        self.close()

    def _enter_micro_batch(self) -> None:
        if self._session is None or self._report is None:
            return
        if self._report.counts:
            self._micro_batch.enter_context(self._session.micro_batch())
        else:
            self._report.begin_micro_batch()

    def _write(self, args: Any, state: Any, model: nn.Module) -> None:
        assert self._report is not None
        if not state.is_world_process_zero:
            return
        self._report.write(
            self._folder or Path(args.output_dir) / "memrt",
            history=state.log_history,
            steps=state.global_step,
            output=str(args.output_dir),
            strategies=[],
            model=type(model).__name__,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            batch_size=args.per_device_train_batch_size,
            accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        )


def _refuse_strategies(args: Any, model: nn.Module) -> None:
    """A session of memrt's own counts what strategies hold; this one would not know of them."""
    named = ("strategies", "memory_budget", "memory_report")
    if vars(model).get(MARK) or any(getattr(args, name, None) for name in named):
        raise two_counts()


def two_counts() -> ValueError:
    """The error of a callback beside a Trainer that has strategies, or counts itself."""
    return ValueError(
        "MemoryProfilerCallback is for a Trainer without strategies, and memrt.Trainer counts "
        "itself: set memory_report=True and leave the callback out"
    )
