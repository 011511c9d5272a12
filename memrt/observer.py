"""The session's one way to its ledger, which may not be there, or be dropped on the way."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from memrt.profiling.accounts import Account, Place
    from memrt.profiling.ledger import Ledger
    from memrt.strategy import Attachment

__all__ = ["Observer"]


class Observer:
    """Tells the ledger who runs, in which phase, and what belongs to which account."""

    def __init__(self, ledger: Ledger | None) -> None:
        self.ledger = ledger
        self._update = ExitStack()
        self._hooks: list[RemovableHandle] = []

    def drop(self) -> None:
        """Count no further. The ledger's log stays readable."""
        if self.ledger is not None:
            self._update.close()
            for hook in self._hooks:  # they hold the model
                hook.remove()
            self._hooks.clear()
            self.ledger.close()
            self.ledger = None

    def owned_by(self, owner: str) -> AbstractContextManager[None]:
        """Storages born inside belong to `owner`."""
        return nullcontext() if self.ledger is None else self.ledger.owned_by(owner)

    def placing(self, place: Place) -> AbstractContextManager[None]:
        """Storages born inside lie in `place`."""
        return nullcontext() if self.ledger is None else self.ledger.placing(place)

    def count_move(self, tensor: Tensor, place: Place) -> None:
        """A copy of `tensor` is about to be made in `place`."""
        if self.ledger is not None:
            self.ledger.count_move(tensor, place)

    def phase(self, name: str, *, step: int) -> AbstractContextManager[None]:
        """Storages born inside are of this phase and optimizer step."""
        return nullcontext() if self.ledger is None else self.ledger.phase(name, step=step)

    def begin_step(self, step: int) -> None:
        """What runs from now on belongs to this optimizer step, whoever calls its parts."""
        if self.ledger is not None:
            self.ledger.begin_step(step)

    def micro_batch(self, *, step: int) -> AbstractContextManager[None]:
        """Forward (and backward, which the ledger sees by itself) of one micro-batch."""
        if self.ledger is not None:
            self.ledger.begin_micro_batch()
        return self.phase("forward", step=step)

    def book_weights(self, model: nn.Module) -> None:
        """Book the parameters and buffers that a model has before it is changed."""
        if self.ledger is not None:
            with self.ledger.phase("load"):
                self.ledger.book_weights(model)

    def register_model(self, model: nn.Module) -> None:
        """Book parameters and buffers, and follow which module runs."""
        if self.ledger is not None:
            with self.ledger.phase("load"):
                self.ledger.register_model(model)
            self.ledger.finish_loading()

    def tag(self, tensor: Tensor, account: Account, *, owner: str) -> None:
        """Book one tensor."""
        if self.ledger is not None:
            self.ledger.tag(tensor, account, owner=owner)

    def book(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        attachments: Iterable[Attachment],
    ) -> None:
        """Book gradients, optimizer state and the strategies' own tensors."""
        if self.ledger is None:
            return
        self.ledger.book_gradients(model)
        if optimizer is not None:
            self.ledger.book_optimizer(optimizer)
        for attachment in attachments:
            for tensor, account in attachment.tensors():
                self.ledger.tag(tensor, account, owner=attachment.name)

    def follow_step(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        attachments: list[Attachment],
    ) -> None:
        """Call the optimizer's step by its name, and book what it made."""
        if self.ledger is None:
            return

        def before(*_: Any) -> None:
            self._update.close()  # of a step that failed
            if self.ledger is not None:
                self._update.enter_context(self.ledger.phase("step"))

        # told which optimizer it is: one that a hook of its own held would outlive its run
        def after(stepped: torch.optim.Optimizer, *_: Any) -> None:
            self._update.close()
            self.book(model, stepped, attachments)

        self._hooks += [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]
