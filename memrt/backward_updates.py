"""Updates in backward: a parameter is stepped when its gradient is final, and the gradient freed.

Autograd accumulates a parameter's gradient when every use of the parameter has given its share and
has read the weight for the last time: a hook there steps the one optimizer for this parameter alone
and drops `.grad`. The gradients account holds the largest gradient (and what one operator gives
together) in place of all. Updates happen in the last micro-batch of a step. With several of them
the sum must be kept from the first to the last, so that nothing is saved; it is exact all the same.

Clipping by the global norm needs all gradients before the first update. `clip="two_pass"` runs
backward twice over the same graph: the first pass takes norms and drops gradients, the second
scales, updates and drops. It costs one more backward (and what recomputes in it), and activations
stay until the second pass. It also knows of a gradient that is not finite in time: the step is then
skipped as a whole. The one-pass form finds it when weights have changed, and stops. What writes
over what it saved (Liger's kernels) has no second backward: the first step compares the norms.

With several micro-batches `"two_pass"` takes one pass and leaves the sum to the ordinary step.

`embeddings=False` leaves what lies outside the repeated layers to that step: those gradients stay
until it, 4 bytes an element (2 in bf16), and the layers' alone are applied in backward.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_leaves

from memrt.errors import NonFiniteGradientError
from memrt.gradients import clip_factor
from memrt.kernels.finite import all_finite
from memrt.profiling.accounts import Account
from memrt.strategy import Attachment, Rule, Slot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch.autograd.graph import Node

    from memrt.session import Session
    from memrt.update_time import UpdateInBackward

__all__ = ["BackwardUpdates", "StepsParameters", "refuse_reentrant", "refuse_sparse"]

_NORM_ROUNDINGS = 2**-5
_NORM_NOISE = 1e-3
"""How far a gradient's norm may be off in the second pass: bf16 rounds it by up to 2^-8, and sums
on a GPU come in any order, which is all there is of a gradient that should be zero: so much of the
global norm."""

_PIECES = "gives a parameter's gradient in pieces"

logger = logging.getLogger(__name__)


class StepsParameters(Protocol):
    """An optimizer that can step some of its parameters, with the bits of a whole step."""

    def step_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """Step those of them that have a gradient."""


def refuse_reentrant(model: nn.Module) -> None:
    """Refuse a model that transformers checkpoints with `use_reentrant=True`."""
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if (
            getattr(module, "gradient_checkpointing", False)
            and isinstance(function, partial)
            and function.keywords.get("use_reentrant")
        ):
            raise ValueError(
                f"{name or type(model).__name__} is checkpointed with use_reentrant=True, which "
                f"{_PIECES}; use gradient_checkpointing_kwargs={{'use_reentrant': False}} or "
                "activation_checkpoint"
            )


def refuse_sparse(model: nn.Module) -> None:
    """Refuse embeddings that give sparse gradients: they come when others have been applied."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if (
            isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            and module.sparse
            and module.weight.requires_grad
        ):
            raise ValueError(
                f"{name or kind} is {kind}(sparse=True), whose gradient is sparse, and updates in "
                f"backward take dense ones; use {kind}(sparse=False)"
            )


def _roots_of(output: object) -> set[Node]:
    """Where the graph of what a model gave begins."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}


def _has_reentrant_checkpoint(roots: set[Node]) -> bool:
    seen, waiting = set(roots), list(roots)
    while waiting:
        node = waiting.pop()
        if node.name() == "CheckpointFunctionBackward":
            return True
        following = {function for function, _ in node.next_functions if function is not None}
        waiting.extend(following - seen)
        seen |= following
    return False


class _Pass(Enum):
    KEEP = "leave gradients where they are"
    MEASURE = "take norms and drop"
    APPLY = "update and drop"


class BackwardUpdates(Attachment):
    """The hooks, what they have seen in this step, and the two passes."""

    settings: UpdateInBackward

    def __init__(self, settings: UpdateInBackward, run: Session) -> None:
        super().__init__(settings, run)
        self.skipped_steps = 0
        """Steps that were left out since a gradient was not finite (two passes only)."""
        self._pass = _Pass.KEEP
        self._seen: set[nn.Parameter] = set()
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._factor: Tensor | None = None
        self._closed = False
        self._driven = False
        self._told = False
        self._graph_is_known = False
        """Whether one pass has seen the graph of a forward, once in this run."""
        self._passes_agree = False
        """Whether a second pass has given the gradients of the first, once in this run."""
        self._noise = torch.zeros((), dtype=torch.float32)
        self._names = {p: name for name, p in run.model.named_parameters() if p.requires_grad}
        self._updated_here = settings.in_backward(run.facts)
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for p in self._names
        ]
        if run.facts.settings.accumulation_steps > 1:
            self._accept_accumulation()

    def rules(self) -> list[Rule]:
        """When parameters are updated, and what their optimizer is made of."""
        time = Rule(
            slot=Slot.UPDATE_TIME,
            match=lambda name, parameter: name in self._updated_here,
            build=lambda name, parameter: "backward",
        )
        return [time, *self.settings.rules(self.run.facts.settings)]

    # ---------------------------------------------------------------- one gradient

    def _arrived(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is None:  # it is never formed (galore)
            return
        if gradient.layout is not torch.strided:
            raise ValueError(
                f"{self.name}: the gradient of {self._names[parameter]} is {gradient.layout}, and "
                "updates take dense ones; use nn.Embedding(sparse=False)"
            )
        if not self._takes(parameter):
            return
        if parameter in self._seen:
            raise RuntimeError(
                f"{self.name}: the gradient of {self._names[parameter]} arrived twice in one step; "
                "call backward once, on the sum of the losses, and checkpoint with "
                "use_reentrant=False"
            )
        self._seen.add(parameter)
        self.run.account(gradient, Account.GRADIENTS, owner="gradients")
        if parameter not in self._norms:
            self._norms[parameter] = get_total_norm([gradient], foreach=True)
        if self._pass is _Pass.APPLY:
            if self._driven and not self._passes_agree:
                self._refuse_other_gradient(parameter, gradient)
            if self._factor is not None:
                gradient.mul_(self._factor.to(gradient.device))
            cast("StepsParameters", self.run.optimizer).step_parameters([parameter])
        parameter.grad = None

    def _refuse_other_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Kernels that write over what they saved are wrong the second time, without a word."""
        first, second = self._norms[parameter], get_total_norm([gradient], foreach=True)
        near = _NORM_ROUNDINGS * first + self._noise.to(first.device)
        if all_finite([torch.where((second - first).abs() <= near, 0.0, torch.nan)]):
            return
        raise RuntimeError(
            f"{self.name}(clip='two_pass'): the norm of the gradient of "
            f"{self._names[parameter]} is {first:.4g} in the first backward pass and "
            f"{second:.4g} in the second: something in the model writes over what it saved "
            "(Liger's kernels do), and some weights are wrong by now; load the model anew, and "
            "use clip='none' with max_grad_norm=0"
        )

    def _takes(self, parameter: nn.Parameter) -> bool:
        """Whether this pass drops the gradient, applied or not."""
        if self._pass is _Pass.APPLY:
            return self._names[parameter] in self._updated_here
        return self._pass is _Pass.MEASURE

    @contextmanager
    def _passing(self, kind: _Pass) -> Iterator[None]:
        self._pass = kind
        self._seen.clear()
        try:
            yield
        finally:
            self._pass = _Pass.KEEP

    # ---------------------------------------------------------------- one micro-batch

    @contextmanager
    def around_micro_batch(self) -> Iterator[None]:
        """Updates happen in the last micro-batch; the gradients of the others stay."""
        last = self.run.last_micro_batch
        if self._closed:
            raise RuntimeError(
                f"{self.name}: a micro-batch after the last one of the step, whose updates are "
                "done; pass last=False for all but the last, or call run.step()"
            )
        if not last:
            self._accept_accumulation()
        if self.settings.clips:
            self._driven = False
            yield
            if last and not self.run.micro_batch_index and not self._driven:
                self._refuse_foreign_backward()
        else:
            with self._passing(_Pass.APPLY if last else _Pass.KEEP), self._seeing_the_graph():
                yield
            self._refuse_non_finite()
        self._closed = last

    @contextmanager
    def _seeing_the_graph(self) -> Iterator[None]:
        """What the model gives is looked at, for the loss need not come by here."""
        if self._graph_is_known:
            yield
            return
        hook = self.run.model.register_forward_hook(self._refuse_pieces)
        try:
            yield
        finally:
            hook.remove()

    def _refuse_pieces(self, model: nn.Module, _: object, output: object) -> None:
        """Gradients in pieces would show when weights have changed already."""
        if torch.compiler.is_compiling():  # there is no graph yet
            return
        roots = _roots_of(output)
        if _has_reentrant_checkpoint(roots):
            raise ValueError(
                f"{self.name}: {type(model).__name__} checkpoints with use_reentrant=True in its "
                f"forward, which {_PIECES}; use checkpoint(..., use_reentrant=False) there, or "
                "activation_checkpoint in its place"
            )
        self._graph_is_known = self._graph_is_known or bool(roots)

    def _accept_accumulation(self) -> None:
        if not self.settings.sums_micro_batches:
            raise ValueError(f"{self.name}: last=False: {self.settings.refusal_of_sums()}")
        if not self._told:
            logger.warning(
                "%s: with several micro-batches a step every gradient lives from the first to the "
                "last, so that updating in backward saves nothing; use larger micro-batches with "
                "activation_checkpoint, or galore",
                self.name,
            )
        self._told = True

    def _refuse_foreign_backward(self) -> None:
        if any(parameter.grad is not None for parameter in self._names):
            raise RuntimeError(
                f"{self.name}(clip='two_pass') runs backward itself, and another one ran; call "
                "run.backward(loss) in place of loss.backward()"
            )

    def _refuse_non_finite(self) -> None:
        """One pass: what is wrong has been applied already."""
        if self._norms and not all_finite([self.run.gradient_norm()]):
            raise NonFiniteGradientError(
                step=self.run.step_index + 1,
                strategy=self.name,
                checkpoint=self.run.last_checkpoint,
            )

    # ---------------------------------------------------------------- two passes

    def backward(self, loss: Tensor) -> None:
        """Two passes over a step of one micro-batch; one pass over each of several."""
        run = self.run
        if not run.last_micro_batch or run.micro_batch_index:
            torch.autograd.backward(loss)
            if run.last_micro_batch and not all_finite([run.gradient_norm()]):
                self._skip(run.gradient_norm())
            return
        self._driven = True
        with self._passing(_Pass.MEASURE), run.phase("norm"):
            torch.autograd.backward(loss, retain_graph=True)
        norm = run.gradient_norm()
        if not all_finite([norm]):
            self._skip(norm)
            return
        run.clear_gradients()  # those that are not in .grad come again, too
        if run.facts.settings.max_grad_norm > 0:
            self._factor = clip_factor(norm, run.facts.settings.max_grad_norm)
        self._noise = _NORM_NOISE * norm
        with self._passing(_Pass.APPLY):
            torch.autograd.backward(loss)
        self._passes_agree = True

    def _skip(self, norm: Tensor) -> None:
        """Leave the step out: no parameter and no state has changed. The log shows the norm."""
        self.skipped_steps += 1
        logger.warning(
            "%s: the gradient norm of optimizer step %d is not finite; the step is skipped (%d so "
            "far)",
            self.name,
            self.run.step_index + 1,
            self.skipped_steps,
        )
        self.run.clear_gradients()
        self._norms = {next(iter(self._names)): norm}

    def gradient_norms(self) -> Mapping[nn.Parameter, Tensor]:
        """The norms of the gradients that are gone."""
        return self._norms

    # ---------------------------------------------------------------- the run

    def before_step(self, step: int) -> None:
        """A Trainer turns checkpointing on when strategies are attached already."""
        if step == 0:
            refuse_reentrant(self.run.model)

    def after_step(self, step: int) -> None:
        """Forget the step."""
        self._seen.clear()
        self._norms = {}
        self._factor = None
        self._closed = False

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped_steps = int(state["skipped_steps"])

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
