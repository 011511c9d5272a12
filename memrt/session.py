"""The session: attaches strategies to a model and drives their doors. The only object that does.

It is also the `run` that strategies are handed. Plain loops get one from `memrt.prepare`, the
Trainer makes its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt import gradients
from memrt.compose import MARK, check_all, refuse_second_session
from memrt.head import install_head
from memrt.observer import Observer
from memrt.optimizer_slots import build_optimizer
from memrt.optimizer_state import OptimizerState
from memrt.places import Mover, place_named
from memrt.saved import SavedTensorChain
from memrt.saved_settings import check_settings
from memrt.strategy import Attachment, Slot, Strategy
from memrt.structure import Facts, RunSettings, discover
from memrt.surgery import Surgery

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from memrt.profiling.accounts import Account, Place
    from memrt.profiling.ledger import Ledger
    from memrt.strategy import Rule

__all__ = ["STATE_VERSION", "Session"]

STATE_VERSION = 1


class Session:
    """One model, its strategies and its run.

    Attaching is all or nothing: conflicts and refusals raise before the model is touched, and a
    failure while attaching undoes what was done.
    """

    def __init__(
        self,
        model: nn.Module,
        strategies: Sequence[Strategy],
        *,
        settings: RunSettings | None = None,
        ledger: Ledger | None = None,
        probe_batches: Callable[[int], Iterable[Any]] | None = None,
    ) -> None:
        self.model = model
        self.strategies = list(strategies)
        self.facts = Facts(
            model=model, structure=discover(model), settings=settings or RunSettings()
        )
        self.step_index = 0
        self.micro_batch_index = 0
        self.last_micro_batch = True
        self.last_checkpoint: str | None = None
        """The folder of the last good checkpoint, for errors that send the user back to it."""
        self._in_step = False
        self._probe_batches = probe_batches
        self._mark = [strategy.name for strategy in self.strategies]
        refuse_second_session(model, self.strategies)  # it is why others may find no weights
        check_all(self.strategies, self.facts)
        self._surgery = Surgery(model)
        self._observer = Observer(ledger)
        self._mover = Mover(model, self._observer)
        self._state = OptimizerState(self._mover, self._observer)
        self.attachments: list[Attachment] = []
        try:
            self._observer.book_weights(model)  # strategies may look at data, and change it
            for strategy in self.strategies:
                with self._observer.owned_by(strategy.name):
                    self.attachments.append(strategy.attach(self))
            self._backward_owner = self._owner_of(Slot.BACKWARD)
            head_owner = self._owner_of(Slot.HEAD)
            self._head = None if head_owner is None else install_head(self, head_owner)
        except BaseException:
            self.detach()
            raise
        self._trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self._saved = SavedTensorChain(self.attachments, model, self._observer)
        self._observer.register_model(model)
        if self.strategies:
            vars(model)[MARK] = self._mark

    @property
    def ledger(self) -> Ledger | None:
        """The ledger that counts this run, while it does."""
        return self._observer.ledger

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer that this session drives (torch's own object, not a wrapper)."""
        return self._state.optimizer

    # ---------------------------------------------------------------- what strategies call

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def replace(self, fqn: str, module: nn.Module) -> None:
        """Put another module in a module's place; undone by `detach`."""
        self._surgery.replace(fqn, module)

    def add(self, fqn: str, module: nn.Module) -> None:
        """Give a module a new child; undone by `detach`."""
        self._surgery.add(fqn, module)

    def recast(self, fqn: str, cls: type[nn.Module]) -> None:
        """Change a module's class in place (names, state and identity stay); undone by `detach`."""
        self._surgery.recast(fqn, cls)

    def move(self, tensor: Tensor, place: Place | str) -> Tensor:
        """A copy of `tensor` in `place`. On CPU and fake runs it copies and marks the storage."""
        return self._mover.move(tensor, place)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A context whose storages the ledger counts in a phase of their own."""
        return self._observer.phase(name, step=self.step_index)

    def account(self, tensor: Tensor, account: Account, *, owner: str) -> None:
        """Book a tensor in the ledger, if there is one."""
        self._observer.tag(tensor, account, owner=owner)

    def activate(self, names: Iterable[str], *, park: Place | str | None = None) -> None:
        """Train exactly these of the model's trainable parameters from now on.

        What leaves loses its gradient, and its optimizer state is dropped or, with `park`, moved
        there until it comes back.
        """
        wanted = set(names)
        unknown = wanted - self._trainable
        if unknown:
            raise ValueError(f"activate: {sorted(unknown)[0]!r} is not a trainable parameter")
        place = None if park is None else place_named(park)
        for name, parameter in self.model.named_parameters():
            if name not in self._trainable:
                continue
            if name in wanted and not parameter.requires_grad:
                parameter.requires_grad_(True)
                self._state.restore(name, parameter)
            elif name not in wanted and parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
                self._state.release(name, parameter, place)

    def probe(self, count: int) -> list[Any]:
        """`count` batches of the held-out set that the user named; the loader is not advanced."""
        if self._probe_batches is None:
            raise ValueError(
                "a strategy wants to look at held-out data, and none was named; "
                "pass probe_dataset=... to the Trainer or probe_batches=... to prepare"
            )
        batches = list(self._probe_batches(count))
        if len(batches) < count:
            raise ValueError(f"the probe set has {len(batches)} batches, {count} are needed")
        return batches

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The model's loss on one probe batch, with the global RNG left as it was."""
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            self._observer.phase("probe", step=self.step_index),
        ):
            output = self.model(**batch)
        loss: Tensor = output["loss"] if isinstance(output, dict) else output[0]
        return loss

    # ---------------------------------------------------------------- what loops call

    def begin_step(self) -> None:
        """Open an optimizer step; `micro_batch` does it by itself."""
        if self._in_step:
            return
        self._in_step = True
        self._observer.begin_step(self.step_index)
        self.micro_batch_index = 0
        for attachment in self.attachments:
            with self._observer.owned_by(attachment.name):
                attachment.before_step(self.step_index)

    @contextmanager
    def micro_batch(self, *, last: bool = True) -> Iterator[None]:
        """Around forward and backward of one micro-batch; `last` closes the accumulation window."""
        self.begin_step()
        self.last_micro_batch = last
        with ExitStack() as stack:
            stack.enter_context(self._observer.micro_batch(step=self.step_index))
            for attachment in self.attachments:
                stack.enter_context(attachment.around_micro_batch())
            stack.enter_context(self._saved.hooks())
            yield
        self.micro_batch_index += 1
        self._book()

    def backward(self, loss: Tensor) -> None:
        """Backward of a micro-batch's loss (divide it by the window's length before)."""
        owner = self._backward_owner
        if owner is None:
            torch.autograd.backward(loss)
        elif self.replaces_forward:
            raise ValueError(
                f"strategy {owner.name!r} replaces forward and backward; "
                "call run.train_micro_batch instead of run.backward"
            )
        else:
            owner.backward(loss)

    @property
    def replaces_backward(self) -> bool:
        """Whether a strategy owns `Slot.BACKWARD`, so that `backward` must be called."""
        return self._backward_owner is not None

    @property
    def replaces_forward(self) -> bool:
        """Whether that one owns forward as well, so that `train_micro_batch` must be called."""
        owner = self._backward_owner
        return owner is not None and type(owner).backward is Attachment.backward

    def train_micro_batch(self, forward: Callable[[], Tensor], *, last: bool = True) -> Tensor:
        """Forward and backward of one micro-batch in one call; any strategy may own them."""
        with self.micro_batch(last=last):
            if self._backward_owner is not None and self.replaces_forward:
                return self._backward_owner.micro_batch(forward)
            loss = forward()
            self.backward(loss)
            return loss.detach()

    def step(self) -> Tensor | None:
        """Clip if `max_grad_norm` is set, update, clear gradients. Returns the norm if clipped."""
        if self.optimizer is None:
            raise RuntimeError("the session has no optimizer; use memrt.prepare or adopt_optimizer")
        if not self._in_step:
            raise RuntimeError("step() without a micro_batch before it: there is nothing to apply")
        norm = None
        with self._observer.phase("step", step=self.step_index):
            if self.facts.settings.max_grad_norm > 0:
                norm = self.clip_gradients(self.facts.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.end_step()
        return norm

    def end_step(self) -> None:
        """Close an optimizer step: `after_step` of every strategy in reverse phase order."""
        if not self._in_step:
            return
        for attachment in reversed(self.attachments):
            attachment.after_step(self.step_index)
        self._in_step = False
        self.step_index += 1

    def abandon_step(self) -> None:
        """Clean up after a step that was opened and never applied (an exception ended it).

        Its gradients go, wherever they are: they must not count in the next step.
        """
        if self._in_step:
            self.clear_gradients()
            for attachment in reversed(self.attachments):
                attachment.after_step(self.step_index)
            self._in_step = False

    def loss_only(self) -> AbstractContextManager[None]:
        """Around an evaluation that looks at the loss alone: who owns the head makes no logits."""
        return nullcontext() if self._head is None else self._head.without_logits()

    # ---------------------------------------------------------------- gradients

    @property
    def has_hidden_gradients(self) -> bool:
        """Whether a strategy keeps gradients outside `.grad`."""
        return gradients.has_hidden_gradients(self.attachments)

    @property
    def norm_kind(self) -> str:
        """`"exact"`, or what a strategy makes of the gradient norm (such as `"projected"`)."""
        return next((a.norm_kind for a in self.attachments if a.norm_kind != "exact"), "exact")

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of this step's gradient, hidden gradients included (0-dim fp32)."""
        return gradients.gradient_norm(self.model, self.attachments, self.device)

    def clear_gradients(self) -> None:
        """Drop this step's gradients, in `.grad` and what strategies keep elsewhere."""
        self.model.zero_grad(set_to_none=True)
        for attachment in self.attachments:
            attachment.clear_gradients()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale every gradient so that the global norm is at most `max_norm`; returns the norm."""
        return gradients.clip_gradients(self.model, self.attachments, self.device, max_norm)

    # ---------------------------------------------------------------- optimizer

    def rules(self) -> list[Rule]:
        """The optimizer parts that strategies give, in phase order."""
        return [rule for attachment in self.attachments for rule in attachment.rules()]

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The one optimizer of this run, composed from the strategies' rules.

        `groups` are torch's parameter groups, with `params` a list of (name, parameter).
        """
        settings = self.facts.settings
        optimizer, self._state.projections = build_optimizer(self.rules(), groups, settings)
        return optimizer

    def adopt_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Drive this optimizer: its state follows `activate`, and the ledger sees its step."""
        self._state.optimizer = optimizer
        self._observer.follow_step(optimizer, self.model, self.attachments)

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the model: optimizer, strategies, parked state. Plain tensors only."""
        state = self.strategy_state()
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, strategies first, then the optimizer."""
        self.load_strategy_state(state)
        if self.optimizer is not None and "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])

    def strategy_state(self) -> dict[str, Any]:
        """The part of the state that is not the optimizer's own."""
        return {
            "version": STATE_VERSION,
            "step": self.step_index,
            "settings": [strategy.to_json() for strategy in self.strategies],
            "strategies": {a.name: a.state_dict() for a in self.attachments},
            "parked": self._state.parked_state(),
        }

    def load_strategy_state(self, state: dict[str, Any]) -> None:
        """Restore `strategy_state`; refuses that of other strategies or of other settings.

        A step that is open is abandoned: nothing of it counts afterwards.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"strategy state has version {state.get('version')!r}, this memrt reads "
                f"{STATE_VERSION}; resume with the memrt that wrote it"
            )
        check_settings(state["settings"], self.strategies, source="the state")
        self.abandon_step()  # its gradients and norms are of weights that this state replaces
        self.step_index = int(state["step"])
        self._state.forget_parked()  # what this run parked so far must not come back
        for attachment in self.attachments:
            with self._observer.owned_by(attachment.name):
                attachment.load_state_dict(state["strategies"][attachment.name])
        self._state.load_parked_state(state["parked"], dict(self.model.named_parameters()))

    def detach(self) -> None:
        """Leave the model as it was found: modules, classes, hooks, `requires_grad`."""
        for attachment in reversed(self.attachments):
            attachment.detach()
        self.attachments = []
        self._surgery.undo()
        if vars(self.model).get(MARK) is self._mark:  # another session's stays
            del vars(self.model)[MARK]
        self._observer.drop()

    def drop_ledger(self) -> None:
        """Count no further: the run goes on at full speed. The ledger's log stays readable."""
        self._observer.drop()

    def export(self) -> nn.Module:
        """Detach, and return the model in a form that plain transformers loads."""
        attachments = list(self.attachments)
        for attachment in reversed(attachments):
            attachment.export(self.model)
        self.detach()
        return self.model

    # ---------------------------------------------------------------- helpers

    def _owner_of(self, slot: Slot) -> Attachment | None:
        for attachment in self.attachments:
            if any(claim.slot is slot for claim in attachment.settings.claims(self.facts)):
                return attachment
        return None

    def _book(self) -> None:
        self._observer.book(self.model, self.optimizer, self.attachments)
