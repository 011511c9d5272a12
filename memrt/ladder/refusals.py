"""Models that a ladder cannot stand beside, refused by name before anything is touched."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn

from memrt.adapters import adapter_layers
from memrt.ladder.shape import body_of

if TYPE_CHECKING:
    from memrt.structure import Facts, LayerStack

__all__ = ["refuse_adapters", "refuse_arguments", "refuse_leftovers", "require_once"]

# of DeBERTa, Gemma 3n, Zamba, Mllama, PEGASUS-X and XLNet
WIDE_ARGUMENTS = frozenset(
    {
        "rel_embeddings",
        "per_layer_input",
        "original_hidden_states",
        "cross_attention_states",
        "global_hidden_states",
        "output_g",
        "r",
    }
)


def refuse_adapters(facts: Facts) -> None:
    """What is there to train must not stop training without a word."""
    kind = type(facts.model).__name__
    adapted = [name for name, _ in adapter_layers(facts.model)]
    adapted += [name for name, _ in facts.model.named_children() if name == "prompt_encoder"]
    if adapted:
        raise ValueError(
            f"{kind} has PEFT's adapters ({adapted[0]}, say), which the ladder would freeze; "
            "fold them in first, model = model.merge_and_unload(), or train them without it"
        )


def refuse_leftovers(facts: Facts, *, behind: Collection[str]) -> None:
    """Frozen blocks say that the backbone is to rest: what trains of it is an oversight.

    `behind`: names of parameters behind the join, which may train.
    """
    own = [(n, p) for n, p in facts.model.named_parameters() if n not in behind]
    trains = [name for name, parameter in own if parameter.requires_grad]
    frozen = [name for name, p in own if not p.requires_grad and _was_frozen(facts, name, p)]
    if trains and frozen:
        raise ValueError(
            f"the backbone is frozen in part: {len(trains)} of its parameters train "
            f"({trains[0]}, say) and {frozen[0]}, say, does not; beside a ladder nothing of it "
            "trains: freeze all of it, model.requires_grad_(False), or nothing, "
            "model.requires_grad_(True); ladder(head='trained') trains what is behind the join"
        )


def _was_frozen(facts: Facts, name: str, parameter: nn.Parameter) -> bool:
    """Whether somebody chose it: a block's weight, neither quantised nor a router's bias."""
    weight = name.endswith("weight") or parameter.ndim > 2
    dense = parameter.is_floating_point() and parameter.dtype.itemsize > 1
    return weight and dense and facts.structure.layer_of(name) is not None


def require_once(facts: Facts, stack: LayerStack) -> None:
    """Blocks that a forward runs several times would be given what the ladder has joined."""
    body, count = body_of(facts.model, stack), len(stack.layers)
    config: Any = None if body is None else facts.model.get_submodule(body).config
    shared = getattr(config, "num_hidden_groups", None) is not None
    passes = config.num_hidden_layers if shared else _listed(facts.model, stack)
    if passes > count:
        remedy = f"num_hidden_groups={passes}" if shared else "a block of its own for each layer"
        raise ValueError(
            f"{type(facts.model).__name__} runs its {count} blocks of {stack.name} {passes} times "
            "a forward, as one for several layers, and the ladder's gradients would be wrong; use "
            f"a model with {remedy}, or another strategy, such as peft(method='lora')"
        )


def _listed(model: nn.Module, stack: LayerStack) -> int:
    """How many times a stack's list names its blocks; each counts once in the stack itself."""
    listed = model.get_submodule(stack.name)._modules.values()
    return sum(module in stack.layers for module in listed)


def refuse_arguments(stack: LayerStack, config: Any) -> None:
    """What a block is given beside the hidden state must not be as wide as the backbone.

    Position biases that it does not hand on, as T5's do, are by head.
    """
    given = inspect.signature(stack.layers[0].forward).parameters
    for name in sorted(WIDE_ARGUMENTS & given.keys()):
        raise ValueError(
            f"the blocks of {stack.name} are given {name} of the model's own width, of which the "
            "side network's blocks can make nothing; use a model without"
        )
    alibi = "alibi" in given and getattr(config, "alibi", True)
    if alibi or ("position_bias" in given and "encoder_decoder_position_bias" not in given):
        raise ValueError(
            f"the blocks of {stack.name} take a position bias for each of their heads (ALiBi), of "
            "which the side network has fewer; use a model with other positions"
        )
