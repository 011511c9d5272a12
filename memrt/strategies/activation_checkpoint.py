"""Activation checkpointing: keep a layer's input, run the layer again in backward.

Gradients are exact. Per checkpointed layer `tokens × hidden` elements (its input) are kept instead
of about 19 to 23 times as much (a SwiGLU decoder layer), plus one layer's activations while it is
recomputed. Costs one more forward of the checkpointed layers (about a third of a step). With
`selective`, the outputs of the named operators are kept too and only the rest is recomputed: more
bytes, fewer FLOPs. Random numbers are replayed. Chen et al. 2016, arXiv 1604.06174; selective by
operator as in Korthikanti et al. 2022, arXiv 2205.05198.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from memrt.errors import unknown_name
from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategy import Attachment, Claim, Phase, Promise, Slot, Strategy
from memrt.surgery import subclass_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["ActivationCheckpoint"]

OPERATORS: dict[str, tuple[str, ...]] = {
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_attention_math",
    ),
}
"""Groups of operators whose outputs `selective` can keep."""


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationCheckpoint(Strategy):
    """Settings.

    every: checkpoint every n-th layer (1: all).
    selective: groups of operators whose outputs are kept: "matmul", "attention". Empty: full.
    """

    name: ClassVar[str] = "activation_checkpoint"
    phase: ClassVar[Phase] = Phase.ACTIVATIONS
    lowers: ClassVar[tuple[Account, ...]] = (Account.ACTIVATIONS,)
    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[Promise]] = frozenset({Promise.PARAMETERS_REST_IN_BACKWARD})

    every: int = 1
    selective: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"every={self.every!r}: must be a whole number of layers, 1 or more")
        if isinstance(self.selective, str):
            raise ValueError(f"selective={self.selective!r}: must be a list such as ['matmul']")
        object.__setattr__(self, "selective", tuple(self.selective))
        for group in self.selective:
            if group not in OPERATORS:
                raise unknown_name("operator group", str(group), OPERATORS)

    @property
    def uniform_layers(self) -> bool:
        """Every layer is treated alike only when all are checkpointed."""
        return self.every == 1

    def check(self, facts: Facts) -> None:
        """Needs repeated layers."""
        if not facts.structure.stacks:
            raise ValueError(
                f"{type(facts.model).__name__} has no list of repeated layers to checkpoint"
            )
        if self.every > min(len(stack.layers) for stack in facts.structure.stacks):
            raise ValueError(f"every={self.every} is more than the model has layers; lower it")
        for name in self._chosen(facts):
            if "forward" in vars(facts.model.get_submodule(name)):
                raise ValueError(
                    f"the forward of {name} was replaced on this instance (accelerate's device_map "
                    "does it), so that it cannot be run again; put the model on one device"
                )
        implementation = getattr(facts.config, "_attn_implementation", "sdpa")
        if "attention" in self.selective and implementation != "sdpa":
            raise ValueError(
                "selective=['attention'] keeps what scaled_dot_product_attention gives, and this "
                f"model computes attention by {implementation!r}; leave 'attention' out or load "
                "the model with attn_implementation='sdpa'"
            )

    def _chosen(self, facts: Facts) -> list[str]:
        return [
            stack.layer_name(index)
            for stack in facts.structure.stacks
            for index in range(len(stack.layers))
            if index % self.every == 0
        ]

    def claims(self, facts: Facts) -> list[Claim]:
        """Recomputation of the chosen layers."""
        return [Claim(slot=Slot.RECOMPUTE, scope=frozenset(self._chosen(facts)))]

    def attach(self, run: Session) -> Attachment:
        """Recast every chosen layer to a class whose forward checkpoints."""
        context = _selective_context(self.selective) if self.selective else None
        made: dict[type[nn.Module], type[nn.Module]] = {}
        for name in self._chosen(run.facts):
            kind = type(run.model.get_submodule(name))
            if kind not in made:
                made[kind] = _checkpointed(kind, context)
            run.recast(name, made[kind])
        return Attachment(self, run)


def _selective_context(groups: tuple[str, ...]) -> Callable[[], Any]:
    names = {name for group in groups for name in OPERATORS[group]}

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator._schema.name in names
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def _without_cache(layer: Any, value: Any) -> Any:
    """None for a key-value cache: the layer would write it twice, and training does not read it."""
    if not (hasattr(value, "update") and hasattr(value, "get_seq_length")):
        return value
    cache = getattr(value, "self_attention_cache", value)
    indices = (getattr(module, "layer_idx", None) for module in layer.modules())
    index = next((found for found in indices if isinstance(found, int)), 0)
    # only the layer's own: its neighbours may have filled theirs in this forward
    for own in getattr(cache, "layers", [cache])[index : index + 1]:
        held = own.get_seq_length() if hasattr(own, "get_seq_length") else 0
        if held:
            raise ValueError(
                f"activation_checkpoint runs layers again without a key-value cache, and this one "
                f"holds {int(held)} positions before the batch (prefix tuning puts them there); "
                "train without activation_checkpoint"
            )
    return None


def _checkpointed(kind: type[nn.Module], context: Callable[[], Any] | None) -> type[nn.Module]:
    options: dict[str, Any] = {"use_reentrant": False}
    if context is not None:
        options["context_fn"] = context
    plain = kind.forward

    class Checkpointed:
        training: bool

        @wraps(plain)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not (self.training and torch.is_grad_enabled()):
                return plain(self, *args, **kwargs)
            args = tuple(_without_cache(self, value) for value in args)
            fixed = {name: _without_cache(self, value) for name, value in kwargs.items()}
            # Tensors go in as positional arguments: only those pass the saved-tensor hooks, so
            # that other strategies and the ledger see them.
            names = [name for name, value in fixed.items() if isinstance(value, Tensor)]
            rest = {name: value for name, value in fixed.items() if name not in names}

            def recomputed(*values: Any) -> Any:
                split = len(values) - len(names)
                named = dict(zip(names, values[split:], strict=True))
                return plain(self, *values[:split], **rest, **named)

            return checkpoint(recomputed, *args, *(fixed[name] for name in names), **options)

    return subclass_of(kind, Checkpointed)
