"""The head door: a strategy that owns head and loss gets the head's input instead of logits.

In training with labels the model's own forward runs, and two things in it are intercepted. Its head
keeps the input (whatever the family does before the head has then happened) and returns a stand-in
for the logits, of one token at the first call and of none later. Its loss function is given the
labels, the divisor and what the model made of the stand-in, and asks the strategy for the loss. The
model's forward goes on with that: a router loss is added, hidden states are returned. An
evaluation whose logits nobody looks at (`loss_only`) goes the same way. Otherwise the model is as
ever, so that metrics, prediction and generation see logits.

What a family does to its logits after the head is a row of `structure.FAMILIES` (a factor, a soft
cap). It is held against what the model made of the first stand-in, so that a family without its row
is an error and never a wrong loss.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt.kernels.mixed_precision import product_dtype
from memrt.surgery import subclass_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memrt.session import Session
    from memrt.strategy import Attachment
    from memrt.structure import Facts, Family

__all__ = ["HeadDoor", "LogitTransform", "check_head", "install_head", "logit_transform"]

_MASKED = "ForMaskedLM"
_CAUSAL = ("ForCausalLM", "ForConditionalGeneration", None)  # None: transformers' default
_IGNORED = -100
_LARGEST_STAND_IN = 40.0  # beyond the soft caps of the families, so that a cap shows


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """What a family does to its logits: softcap * tanh(scale * logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float() * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def logit_transform(facts: Facts) -> LogitTransform:
    """The transform of the model's logits, from its family's row and its config."""
    family, config = facts.structure.family, facts.config
    softcap = getattr(config, family.softcap_key, None) if family.softcap_key else None
    scale = getattr(config, family.scale_key, None) if family.scale_key else None
    factor = 1.0 if scale is None else float(scale)
    return LogitTransform(
        scale=1.0 / factor if family.divide_by_scale else factor,
        softcap=None if softcap is None else float(softcap),
    )


def check_head(facts: Facts) -> None:
    """Refuse models whose head cannot be taken over: `ValueError` with the reason."""
    kind = type(facts.model).__name__
    head_name = facts.structure.head
    if head_name is None:
        raise ValueError(
            f"{kind} has no language-model head; use it on a causal or masked language model"
        )
    head = facts.model.get_submodule(head_name)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head {head_name!r} of {kind} is a {type(head).__name__}, not a plain linear layer"
        )
    _check_forward(facts.model.get_submodule(_language_model(facts)), facts.structure.family)
    if facts.settings.label_smoothing:
        raise ValueError(
            f"label_smoothing_factor={facts.settings.label_smoothing} needs logits; set it to 0"
        )
    if facts.settings.custom_loss:
        raise ValueError("compute_loss_func needs logits; leave it out")


def _check_forward(model: nn.Module, family: Family) -> None:
    """Refuse a forward whose loss cannot be known to be the cross-entropy that it seems."""
    kind = type(model).__name__
    if "forward" in vars(model):
        raise ValueError(
            f"{kind}.forward was replaced on this instance (TRL's SFTTrainer does it to fuse its "
            "own head); drop one of the two"
        )
    if "_loss_function" in vars(model):
        raise ValueError(f"{kind}.loss_function was replaced on this instance; drop one of the two")
    loss_type = getattr(model, "loss_type", None)
    through_loss_function = loss_type in _CAUSAL and _calls_loss_function(model)
    known = loss_type == _MASKED or through_loss_function or family.own_mean_loss
    if not known:
        raise ValueError(
            f"{kind} (loss_type={loss_type!r}) computes its loss in a way of its own, not through "
            "transformers' loss_function for causal or masked language models"
        )


def _language_model(facts: Facts) -> str:
    """The name of the transformers model that owns the head: the model, or one that it wraps."""
    assert facts.structure.head is not None
    head = facts.model.get_submodule(facts.structure.head)
    for name, module in facts.model.named_modules():
        if "loss_type" in vars(module) and module.get_output_embeddings() is head:
            return str(name)
    raise ValueError(
        f"{type(facts.model).__name__} is no transformers model and wraps none, so that nothing "
        "says what loss its head has; compute head and loss in the loop"
    )


def _calls_loss_function(model: nn.Module) -> bool:
    return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names


class HeadDoor:
    """One forward's passage through head and loss, while it is entered as a context."""

    def __init__(self, owner: Attachment, transform: LogitTransform, *, masked: bool) -> None:
        self.active = False
        self.loss_only = False
        """Whether an evaluation needs the loss alone, as training does."""
        self._owner = owner
        self._transform = transform
        self._masked = masked
        self._checked = False
        self._hidden: Tensor | None = None
        self._stand_in: Tensor | None = None
        self._loss: Tensor | None = None

    def __enter__(self) -> HeadDoor:
        self.active = True
        return self

    def __exit__(self, *_: object) -> None:
        self.active = False
        self._hidden = self._stand_in = self._loss = None

    @contextmanager
    def without_logits(self) -> Iterator[None]:
        """Around an evaluation that needs the loss alone."""
        self.loss_only = True
        try:
            yield
        finally:
            self.loss_only = False

    def take(self, hidden: Tensor, vocabulary: int) -> Tensor:
        """Keep the head's input [..., tokens, hidden]; returns [..., 1 or 0, vocabulary]."""
        if self._hidden is not None:
            raise ValueError("the model calls its head more than once for a loss")
        self._hidden = hidden
        num_tokens = 0 if self._checked else 1
        stand_in = torch.linspace(
            -_LARGEST_STAND_IN, _LARGEST_STAND_IN, vocabulary, device=hidden.device
        ).to(product_dtype(hidden))
        shape = (*hidden.shape[:-2], num_tokens, vocabulary)
        self._stand_in = stand_in.expand(shape)
        return self._stand_in.clone()  # whole: the model may change it in place

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = _IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """What transformers' loss functions return; their arguments, and all others ignored too."""
        if self._hidden is None or self._stand_in is None:
            raise ValueError("the model computed its loss without a call of its head")
        if self._loss is not None:
            raise ValueError("the model computes its head's loss more than once")
        self._check(logits, self._stand_in)
        if not self._masked:
            padded = nn.functional.pad(labels, (0, 1), value=ignore_index)
            labels = padded[..., 1:] if shift_labels is None else shift_labels
        if labels.shape != self._hidden.shape[:-1]:
            raise ValueError(
                f"labels are {tuple(labels.shape)} and the head's input is "
                f"{tuple(self._hidden.shape)}: give a label for every token, without logits_to_keep"
            )
        if ignore_index != _IGNORED:
            labels = labels.masked_fill(labels == ignore_index, _IGNORED)
        self._loss = self._owner.loss(self._hidden, labels, num_items_in_batch)
        return self._loss

    def finish(self, output: Any) -> Any:
        """The model's output without the stand-in; refuses a forward that took another way."""
        if self._loss is None:
            raise ValueError("the model was given labels and returned without computing its loss")
        if isinstance(output, tuple):
            return (output[0], None, *output[2:])
        return type(output)(**{k: v for k, v in output.items() if k != "logits"})

    def _check(self, logits: Tensor, stand_in: Tensor) -> None:
        """At the first loss: the model did to its logits what its family's row says."""
        if self._checked:
            return
        self._checked = True
        expected = self._transform(stand_in)
        if logits.shape == expected.shape:
            error = (logits.float() - expected).abs().max()
            if _is_fake(error):
                return
            # the transform is in fp32, also for a model in fp64
            epsilon = max(torch.finfo(dtype).eps for dtype in (stand_in.dtype, torch.float32))
            if float(error) <= 4 * epsilon * _LARGEST_STAND_IN:
                return
        raise ValueError(
            f"the model changes its logits after the head by more than {self._transform}, which "
            "is all that is known of its family; add its row to memrt.structure.FAMILIES"
        )


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def install_head(run: Session, owner: Attachment) -> HeadDoor:
    """Recast model and head so that training with labels goes through `owner.loss`."""
    head_name = run.facts.structure.head
    assert head_name is not None
    name = _language_model(run.facts)
    model, head = run.model.get_submodule(name), run.model.get_submodule(head_name)
    passage = HeadDoor(
        owner,
        logit_transform(run.facts),
        masked=getattr(model, "loss_type", None) == _MASKED
        or run.facts.structure.family.own_mean_loss,
    )
    run.recast(head_name, subclass_of(type(head), _intercepting_head(type(head), passage)))
    own_loss = not _calls_loss_function(model)
    mixin = _intercepting_model(type(model), passage, own_loss=own_loss)
    run.recast(name, subclass_of(type(model), mixin))
    return passage


def _intercepting_head(kind: type[nn.Module], passage: HeadDoor) -> type:
    plain = kind.forward

    class Head:
        out_features: int

        @wraps(plain)
        def forward(self, x: Tensor) -> Tensor:
            if passage.active:
                return passage.take(x, self.out_features)
            result: Tensor = plain(self, x)
            return result

    return Head


def _intercepting_model(kind: type[nn.Module], passage: HeadDoor, *, own_loss: bool) -> type:
    plain: Callable[..., Any] = kind.forward
    signature = inspect.signature(plain)

    class Model:
        training: bool

        @property
        def loss_function(self) -> Any:
            return passage.loss if passage.active else super().loss_function  # type: ignore[misc]

        @wraps(plain)  # trainers and generation read the signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            call = signature.bind(self, *args, **kwargs)
            labels = call.arguments.get("labels")
            if labels is None or not (self.training or passage.loss_only):
                return plain(self, *args, **kwargs)
            with passage:
                if not own_loss:
                    return passage.finish(plain(self, *args, **kwargs))
                # of the older kind: a plain mean over its labels, computed in the forward
                call.arguments["labels"] = None
                _give_decoder_inputs(self, call, labels)
                output = plain(*call.args, **call.kwargs)
                from transformers.modeling_outputs import MaskedLMOutput

                loss = passage.loss(output[0], labels)
                kept = output if isinstance(output, dict) else {}
                made = type(output) if kept else MaskedLMOutput
                return made(**{**kept, "loss": loss, "logits": None})

    return Model


def _give_decoder_inputs(model: Any, call: inspect.BoundArguments, labels: Tensor) -> None:
    """What an encoder-decoder's forward makes of its labels, which it is not given."""
    given = ("decoder_input_ids", "decoder_inputs_embeds")
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None and all(call.arguments.get(name) is None for name in given):
        call.arguments["decoder_input_ids"] = prepare(labels)
