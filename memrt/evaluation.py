"""Evaluation under a Trainer that keeps no logits which nobody asks for.

Without metrics the loss is all there is, and a strategy that owns the head makes no logits at all.
With metrics, logits of a batch leave the device before the next one; transformers' own default
gathers those of the whole set there. A streamed metric, one that takes `compute_result`, is given
each batch and nothing is kept:

    def accuracy(prediction, *, compute_result): ...     # add up, and at the end return the metrics

Any other gets the logits of the whole set, which then lie in host memory: evaluation says how much
that will be, and refuses more than there is. `preprocess_logits_for_metrics` makes less of them.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import psutil
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import Trainer as _Trainer

    from memrt.session import Session
else:
    _Trainer = object

__all__ = ["EvaluationMixin", "is_streamed"]

_NOTED_BYTES = 2**30

logger = logging.getLogger(__name__)


def is_streamed(compute_metrics: Callable[..., Any] | None) -> bool:
    """Whether a metric cannot be called without saying if this batch is the last."""
    if compute_metrics is None:
        return False
    parameter = inspect.signature(compute_metrics).parameters.get("compute_result")
    return parameter is not None and parameter.default is inspect.Parameter.empty


class EvaluationMixin(_Trainer):  # type: ignore[misc]
    """How a Trainer evaluates and predicts."""

    session: Session | None = None
    _num_prediction_batches = 0
    """Of an evaluation that keeps its predictions and has not yet said how much that is."""

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' loop, with predictions on the host and metrics streamed that can be."""
        only = self.args.prediction_loss_only
        loss_only = only if prediction_loss_only is None else prediction_loss_only
        with self._frugal_arguments(predicts=not loss_only):
            keeps = not self.args.batch_eval_metrics and self.preprocess_logits_for_metrics is None
            self._num_prediction_batches = _length(dataloader) if keeps and not loss_only else 0
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, *args, **kwargs
            )

    @contextmanager
    def _frugal_arguments(self, *, predicts: bool) -> Iterator[None]:
        args = self.args
        kept = args.batch_eval_metrics, args.eval_accumulation_steps
        if is_streamed(self.compute_metrics):
            args.batch_eval_metrics = True
        # transformers also empties the device's cache then, which losses alone are not worth
        if predicts and args.eval_accumulation_steps is None and args.device.type != "cpu":
            args.eval_accumulation_steps = 1
        try:
            yield
        finally:
            args.batch_eval_metrics, args.eval_accumulation_steps = kept

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' `prediction_step`; one that returns the loss alone makes no logits."""
        session = self.session if prediction_loss_only else None
        with nullcontext() if session is None else session.loss_only():
            loss, logits, labels = super().prediction_step(
                model, inputs, prediction_loss_only, *args, **kwargs
            )
        if self._num_prediction_batches:
            _check_host_memory(_num_bytes(logits) * self._num_prediction_batches)
            self._num_prediction_batches = 0
        return loss, logits, labels


def _length(dataloader: Any) -> int:
    try:
        return len(dataloader)
    except TypeError:  # an iterable dataset: nobody knows how long it is
        return 0


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    return 0 if value is None else sum(map(_num_bytes, value))


def _check_host_memory(num_bytes: int) -> None:
    """Say what the predictions of a whole set will take; refuse what is not there."""
    if num_bytes < _NOTED_BYTES:
        return
    size = f"{num_bytes / 2**30:.1f} GiB"
    remedy = (
        "give preprocess_logits_for_metrics, which makes less of each batch, or a metric that "
        "takes compute_result and is given one batch at a time"
    )
    available = _available_bytes()
    if num_bytes > available:
        raise ValueError(
            f"the predictions of this evaluation take {size} of host memory and "
            f"{available / 2**30:.1f} GiB are free; {remedy}"
        )
    logger.warning("the predictions of this evaluation take %s of host memory; %s", size, remedy)


def _available_bytes() -> int:
    return int(psutil.virtual_memory().available)
