"""What `memrt train` shows while it runs: a bar on a terminal, a line for every log, on stderr."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["ConsoleCallback", "Intervals", "Speed"]


class Speed(TrainerCallback):  # type: ignore[misc]
    """Tokens per second of training: evaluating, saving and the steps under a ledger left out."""

    def __init__(self, *, num_counted_steps: int) -> None:
        self._num_counted_steps = num_counted_steps
        self._num_steps = 0
        self._since = 0.0
        self._tokens_before = 0
        self.num_tokens = 0
        self.seconds = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """None where every step was counted, or tokens were not."""
        return self.num_tokens / self.seconds if self.num_tokens and self.seconds else None

    def _restart(self, state: Any) -> None:
        self._since = time.perf_counter()
        self._tokens_before = state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first step of this process begins; a checkpoint brings the tokens of before."""
        if self._num_steps == 0:
            self._restart(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the time since the last step, or since what came between."""
        self._num_steps += 1
        if self._num_steps > self._num_counted_steps:
            self.seconds += time.perf_counter() - self._since
            self.num_tokens += state.num_input_tokens_seen - self._tokens_before
        self._restart(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluation is over."""
        self._restart(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint is written."""
        self._restart(state)


class Intervals(TrainerCallback):  # type: ignore[misc]
    """Takes the intervals from the arguments, also when resumed, and logs the last step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint brings the intervals that it was written with."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last step is logged whatever `logging_steps`."""
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class ConsoleCallback(TrainerCallback):  # type: ignore[misc]
    """Logs as lines; on a terminal a bar under them."""

    def __init__(self, speed: Speed, *, with_bar: bool) -> None:
        self._speed = speed
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._with_bar = with_bar and sys.stderr.isatty()
        self._open = ExitStack()
        self._bar: Progress | None = None
        self._task: Any = None

    def close(self) -> None:
        """Take the bar off, also when training did not come to its end."""
        self._open.close()
        self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar, from where a resumed run begins."""
        if not self._with_bar:
            return
        self._bar = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._open.enter_context(self._bar)
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar off."""
        self.close()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """One line for the losses; the run's summary at its end is left to the report."""
        logs = logs or {}
        place = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            norm = next((logs[name] for name in logs if name.startswith("grad_norm")), None)
            parts = [place, f"loss {logs['loss']:.4f}"]
            parts += [f"learning rate {logs['learning_rate']:.3g}"]
            parts += [] if norm is None else [f"gradient norm {norm:.3g}"]
            speed = self._speed.tokens_per_second
            parts += [] if speed is None else [f"{speed:,.0f} tokens/s"]
            self._console.print("  ".join(parts), markup=False)
        elif "eval_loss" in logs:
            accuracy = logs.get("eval_accuracy")
            told = "" if accuracy is None else f"  accuracy {accuracy:.4f}"
            text = f"{place}  evaluation loss {logs['eval_loss']:.4f}{told}"
            self._console.print(text, markup=False)
