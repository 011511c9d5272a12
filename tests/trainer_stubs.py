"""Small strategies and callbacks that show what the Trainer does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from memrt.session import Session
from memrt.strategy import Attachment, Claim, Phase, Rule, Slot, Strategy
from memrt.structure import Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch(Strategy):
    """Writes down what the session calls."""

    name: ClassVar[str] = "watch"

    def attach(self, run: Session) -> Attachment:
        return Watching(self, run)


class Watching(Attachment):
    def __init__(self, settings: Strategy, run: Session) -> None:
        super().__init__(settings, run)
        self.calls: list[str] = []

    def before_step(self, step: int) -> None:
        self.calls.append(f"before {step}")

    def after_step(self, step: int) -> None:
        self.calls.append(f"after {step}")

    @contextmanager
    def around_micro_batch(self) -> Iterator[None]:
        yield
        self.calls.append("last" if self.run.last_micro_batch else "micro")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward(Strategy):
    """Owns backward and does there what autograd does."""

    name: ClassVar[str] = "own_backward"

    def claims(self, facts: Facts) -> list[Claim]:
        return [Claim(slot=Slot.BACKWARD)]

    def attach(self, run: Session) -> Attachment:
        return OwnBackward(self, run)


class OwnBackward(Attachment):
    def micro_batch(self, forward: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            forward()  # as a method does that needs the loss twice
        loss = forward()
        loss.backward()
        return loss.detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hide(Strategy):
    """Keeps every other gradient outside `.grad` until the optimizer steps."""

    name: ClassVar[str] = "hide"

    def attach(self, run: Session) -> Attachment:
        return Hiding(self, run)


class Hiding(Attachment):
    norm_kind = "hidden"

    def __init__(self, settings: Strategy, run: Session) -> None:
        super().__init__(settings, run)
        self.hidden: dict[torch.nn.Parameter, Tensor] = {}
        self._hooked = False

    def before_step(self, step: int) -> None:
        if not self._hooked:
            assert self.run.optimizer is not None
            self.run.optimizer.register_step_pre_hook(lambda *_: self._give_back())
            self._hooked = True

    def _give_back(self) -> None:
        for parameter, gradient in self.hidden.items():
            parameter.grad = gradient
        self.hidden = {}

    @contextmanager
    def around_micro_batch(self) -> Iterator[None]:
        yield
        if self.run.last_micro_batch:
            for parameter in list(self.run.model.parameters())[::2]:
                assert parameter.grad is not None
                self.hidden[parameter], parameter.grad = parameter.grad, None

    def squared_gradient_norm(self) -> Tensor | None:
        return torch.stack([g.square().sum() for g in self.hidden.values()]).sum()

    def scale_gradients(self, factor: Tensor) -> None:
        for gradient in self.hidden.values():
            gradient.mul_(factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bring(Strategy):
    """Brings a part of the optimizer."""

    name: ClassVar[str] = "bring"
    phase: ClassVar[Phase] = Phase.UPDATE

    def attach(self, run: Session) -> Attachment:
        return Bringing(self, run)


class Bringing(Attachment):
    def rules(self) -> list[Rule]:
        return [
            Rule(
                slot=Slot.STATE_FORMAT,
                match=lambda name, parameter: True,
                build=lambda name, parameter: "float32",
            )
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Strategy):
    """Looks at held-out data before every step."""

    name: ClassVar[str] = "probing"

    def attach(self, run: Session) -> Attachment:
        return Probing(self, run)


class Probing(Attachment):
    losses: list[float]

    def before_step(self, step: int) -> None:
        self.losses = [self.run.loss(batch).item() for batch in self.run.probe(2)]


class Poison(transformers.TrainerCallback):  # type: ignore[misc]
    """Makes the loss infinite or NaN in the step after `steps` whole ones."""

    def __init__(self, value: float, steps: int) -> None:
        self.value, self.steps = value, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps:
            kwargs["model"].lm_head.weight.data[0, 0] = self.value
