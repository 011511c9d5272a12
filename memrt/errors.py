"""Errors that a user can cause: one sentence that names the argument, the value and the remedy."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CheckpointWriteError",
    "ConflictError",
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "nearest",
    "unknown_name",
]


class ConflictError(ValueError):
    """Strategies or trainer settings that cannot work together; lists every conflict found."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"these strategies cannot run together ({count}):\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?`, or nothing when no known name is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not known: says which are, and which is nearest."""
    known = sorted(known)
    return ValueError(
        f"unknown {kind} {name!r}{nearest(name, known)} (known: {', '.join(known) or 'none'})"
    )


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite; nothing was updated with it."""

    def __init__(self, *, step: int, loss: float, checkpoint: str | None) -> None:
        self.step = step
        self.checkpoint = checkpoint
        saved = f"the last good checkpoint is {checkpoint}" if checkpoint else "none is saved yet"
        told = f"the loss is {loss} at optimizer step {step}"
        remedy = "Lower the learning rate, set max_grad_norm, or look at the batch of this step"
        if step == 1:
            told += ", before anything was updated"
            remedy = (
                "The learning rate is not the cause: look for NaN in the weights that were "
                "loaded, and for a batch whose labels are all -100"
            )
        super().__init__(f"{told}; the step was not applied and {saved}. {remedy}")


class NonFiniteGradientError(FloatingPointError):
    """A gradient became NaN or infinite when parameters had been updated in backward already."""

    def __init__(self, *, step: int, strategy: str, checkpoint: str | None) -> None:
        self.step = step
        self.checkpoint = checkpoint
        saved = f"go back to the last good checkpoint, {checkpoint}" if checkpoint else "start anew"
        super().__init__(
            f"a gradient is not finite at optimizer step {step}, and {strategy} has applied it: "
            f"the weights of now are spoilt, {saved}. Lower the learning rate, or use "
            f"{strategy}(clip='two_pass'), which skips such a step"
        )


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; what was saved before is untouched."""

    def __init__(self, *, folder: str, free_bytes: int, cause: BaseException) -> None:
        self.folder = folder
        self.free_bytes = free_bytes
        super().__init__(
            f"{folder} could not be written: {type(cause).__name__}: {cause}. Its disk has "
            f"{free_bytes / 2**30:.2f} GiB free; earlier checkpoints are untouched and nothing of "
            "this one is left. Free space, or set output_dir, save_total_limit or save_only_model"
        )
