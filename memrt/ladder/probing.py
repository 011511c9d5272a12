"""Looking at data before the first step: batches of the probe set, through a model at rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from memrt.session import Session

__all__ = ["probe_batches", "resting_model"]


def probe_batches(run: Session, count: int, *, init: str) -> list[Any]:
    """`count` batches of the run's probe set, or what to do without."""
    try:
        return run.probe(count)
    except ValueError as refused:
        raise ValueError(
            f"init={init!r} looks at data before the first step, and has too little: {refused}; or "
            "lower probe_batches, or use init='magnitude', which needs none and whose steps take "
            "the same memory"
        ) from refused


@contextmanager
def resting_model(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
