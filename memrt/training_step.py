"""One micro-batch under a Trainer: the strategies' contexts, and backward where they own it.

`training_step` stays that of the Trainer under the mixin, with all that it does beside (GRPO counts
its steps there, SFT offloads activations). A strategy that owns backward, or updates within it, is
given the loss by the accelerator, which every such method calls.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt.errors import ConflictError, NonFiniteLossError
from memrt.optimizer_slots import updates_in_backward

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Trainer as _Trainer

    from memrt.session import Session
else:
    _Trainer = object

__all__ = ["TrainingStepMixin"]


class TrainingStepMixin(_Trainer):  # type: ignore[misc]
    """How a Trainer runs forward and backward."""

    session: Session | None = None
    _stop_on_nonfinite = False
    _last_checkpoint: str | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch, inside the strategies' contexts or with a backward of their own."""
        session = self.session
        loss: Tensor
        if session is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        elif session.replaces_forward:
            loss = self._step_without_backward(session, model, inputs, num_items_in_batch)
        else:
            last = self.accelerator.sync_gradients
            with session.micro_batch(last=last), self._own_backward(session):
                loss = super().training_step(model, inputs, num_items_in_batch)
        self._refuse_nonfinite(loss)
        return loss

    @contextmanager
    def _own_backward(self, session: Session) -> Iterator[None]:
        """Stand before the backward of this Trainer's accelerator for one micro-batch."""
        if not (session.replaces_backward or updates_in_backward(session)):
            yield
            return
        accelerator: Any = self.accelerator
        theirs = accelerator.backward

        def backward(loss: Tensor, **options: Any) -> None:
            self._refuse_nonfinite(loss.detach())  # afterwards its gradients have been applied
            if session.replaces_backward:
                session.backward(loss)
            else:
                theirs(loss, **options)

        own: dict[str, Any] = vars(accelerator)
        hidden = {"backward": own["backward"]} if "backward" in own else {}
        own["backward"] = backward
        try:
            yield
        finally:
            del own["backward"]
            own.update(hidden)

    def _refuse_nonfinite(self, loss: Tensor) -> None:
        if self._stop_on_nonfinite and not bool(torch.isfinite(loss).all()):
            raise NonFiniteLossError(
                step=self.state.global_step + 1, loss=float(loss), checkpoint=self._last_checkpoint
            )

    def _step_without_backward(
        self, session: Session, model: nn.Module, inputs: dict[str, Any], num_items: Any
    ) -> Tensor:
        model.train()
        prepared = self._prepare_inputs(inputs)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # of later transformers 5
        if scaled is None:  # num_items counts the whole step: a loss divided by it needs no more
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items is not None
            )

        def forward() -> Tensor:
            with self.compute_loss_context_manager():
                # compute_loss takes labels out of its inputs, and forward may be called again
                loss = self.compute_loss(model, dict(prepared), num_items_in_batch=num_items)
            result: Tensor = loss if scaled else loss / self.current_gradient_accumulation_steps
            return result

        return session.train_micro_batch(forward, last=self.accelerator.sync_gradients)

    def _refuse_own_step(self, session: Session) -> None:
        """Where a strategy owns forward as well, a Trainer's own `training_step` is passed by."""
        order = type(self).__mro__
        under = order[order.index(TrainingStepMixin) + 1 :]
        owner = next(cls for cls in under if "training_step" in vars(cls))
        if session.replaces_forward and not owner.__module__.startswith("transformers."):
            raise ConflictError(
                [
                    f"{owner.__name__} has a training_step of its own, which a strategy that owns "
                    "forward and backward would pass by; leave that strategy out"
                ]
            )
