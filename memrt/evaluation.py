"""Evaluation under a Trainer that keeps no logits which nobody asks for.

Without metrics the loss is all there is, and a strategy that owns the head makes no logits at all.
With metrics, logits of a batch leave the device before the next one; transformers' own default
gathers those of the whole set there. A streamed metric, one that takes `compute_result`, is given
each batch and nothing is kept:

    def accuracy(prediction, *, compute_result): ...     # add up, and at the end return the metrics

Any other gets the logits of the whole set, which then lie in host memory, and so do those that
`predict` returns: evaluation says how much that will be, and refuses more than there is.
`preprocess_logits_for_metrics` makes less of them.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import psutil
import torch
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
    gather_function: Any
    compute_metrics: Any
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
        with ExitStack() as stack:
            stack.enter_context(self._frugal_arguments(predicts=not loss_only))
            streams = self.args.batch_eval_metrics
            # transformers asks by this word whether the logits are wanted beside their metric
            keeps = not loss_only and (not streams or description == "Prediction")
            if keeps and streams and self.args.device.type != "cpu":
                stack.enter_context(self._kept_on_host())
            whole = keeps and self.preprocess_logits_for_metrics is None
            self._num_prediction_batches = _length(dataloader) if whole else 0
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

    @contextmanager
    def _kept_on_host(self) -> Iterator[None]:
        """transformers moves nothing to the host where it also gives a metric each batch."""
        gather, metric = self.gather_function, self.compute_metrics

        def gather_to_host(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            return _moved(gather(tensors, *args, **kwargs), torch.device("cpu"))

        def metric_on_device(prediction: Any, **kwargs: Any) -> Any:
            names = ("predictions", "label_ids", "inputs", "losses")
            moved = {n: _moved(getattr(prediction, n), self.args.device) for n in names}
            return metric(type(prediction)(**moved), **kwargs)

        self.gather_function = gather_to_host
        self.compute_metrics = None if metric is None else metric_on_device
        try:
            yield
        finally:
            self.compute_metrics = metric
            if self.gather_function is gather_to_host:  # the loop sets its own at its end
                self.gather_function = gather

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
            _check_host_memory(
                _num_host_bytes(logits) * self._num_prediction_batches,
                joins=self.args.eval_do_concat_batches and self._num_prediction_batches > 1,
            )
            self._num_prediction_batches = 0
        return loss, logits, labels


def _length(dataloader: Any) -> int:
    try:
        return len(dataloader)
    except TypeError:  # an iterable dataset: nobody knows how long it is
        return 0


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, however nested, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    kind: Any = type(value)
    if isinstance(value, Mapping):
        return kind({key: _moved(each, device) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return kind(_moved(each, device) for each in value)
    return value


def _num_host_bytes(value: Any) -> int:
    """Of tensors as numpy's arrays, which know no bf16: transformers makes fp32 of it."""
    if isinstance(value, Tensor):
        return value.numel() * (4 if value.dtype is torch.bfloat16 else value.itemsize)
    if isinstance(value, Mapping):
        value = value.values()
    return 0 if value is None else sum(map(_num_host_bytes, value))


def _check_host_memory(num_bytes: int, *, joins: bool) -> None:
    """Say what the predictions of a whole set will take; refuse what is not there.

    `joins`: transformers copies all that it has for every batch that comes to it.
    """
    if num_bytes < _NOTED_BYTES:
        return
    takes = f"the predictions of this evaluation take {num_bytes / 2**30:.1f} GiB of host memory"
    if joins:
        takes += ", and as much again while batches are joined"
    remedy = (
        "give preprocess_logits_for_metrics, which makes less of each batch, or a metric that "
        "takes compute_result and is given one batch at a time"
    )
    available = _available_bytes()
    if num_bytes * (2 if joins else 1) > available:
        raise ValueError(f"{takes}: {available / 2**30:.1f} GiB are free; {remedy}")
    logger.warning("%s; %s", takes, remedy)


def _available_bytes() -> int:
    return int(psutil.virtual_memory().available)
