"""Where a model keeps its layers, attention, MLP, embeddings and head, found by structure.

No transformers import: repeated blocks are the lists of like modules that hold the parameters (one,
or an encoder's and a decoder's), embeddings and head come from the model's own accessors or from
module types. What structure cannot tell is *data*: a row of `FAMILIES`, keyed by
`config.model_type`. Adding a family is adding a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from memrt.values import check_seed, is_number

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "FAMILIES",
    "Facts",
    "Family",
    "LayerStack",
    "RunSettings",
    "Structure",
    "discover",
    "is_plain_linear",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What structure alone does not tell about a `model_type`."""

    softcap_key: str | None = None
    """Config key of a soft cap on the logits."""
    scale_key: str | None = None
    """Config key of a factor on the logits."""
    divide_by_scale: bool = False
    """Whether the logits are divided by that factor instead."""
    own_mean_loss: bool = False
    """Whether the forward computes the mean cross-entropy of unshifted labels itself."""


_MULTIPLIED = Family(scale_key="logit_scale")
_DIVIDED = Family(scale_key="logits_scaling", divide_by_scale=True)
_CAPPED = Family(softcap_key="final_logit_softcapping")
_OWN_LOSS = Family(own_mean_loss=True)

FAMILIES: Mapping[str, Family] = {
    "beam": _CAPPED,
    "cohere": _MULTIPLIED,
    "cohere2": _MULTIPLIED,
    "cohere2_moe": _MULTIPLIED,
    "gemma2": _CAPPED,
    "gemma3_text": _CAPPED,
    "gemma3n_text": _CAPPED,
    "gemma4_text": _CAPPED,
    "granite": _DIVIDED,
    "granite_swa": _DIVIDED,
    "granitemoe": _DIVIDED,
    "granitemoe_swa": _DIVIDED,
    "granitemoehybrid": _DIVIDED,
    "granitemoeshared": _DIVIDED,
    "hyperclovax": Family(scale_key="logits_scaling"),
    "inkling2_text": _CAPPED,
    "longt5": _OWN_LOSS,
    "mt5": _OWN_LOSS,
    "nanochat": _CAPPED,
    "recurrent_gemma": Family(softcap_key="logits_soft_cap"),
    "t5": _OWN_LOSS,
    "umt5": _OWN_LOSS,
    "vaultgemma": _CAPPED,
    "xlstm": Family(softcap_key="output_logit_soft_cap"),
}

PLAIN_LINEARS = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})
"""Subclasses of `nn.Linear` with a forward of their own that is y = x Wᵀ + b all the same."""

_ATTENTION_NAMES = ("attn", "attention")

_SMALLEST_SHARE = 0.1
"""Lists of blocks with less than this share of the largest list's parameters are not layers but
something beside them (heads, adapters, projections)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStack:
    """One list of repeated blocks, such as `model.layers`."""

    name: str
    layers: tuple[nn.Module, ...]
    keys: tuple[str, ...]
    """Each block's name in the list; a block that comes twice has the first."""

    def layer_name(self, index: int) -> str:
        """Dotted name of one block."""
        return f"{self.name}.{self.keys[index]}" if self.name else self.keys[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """Dotted names of the parts of a model."""

    stacks: tuple[LayerStack, ...]
    embeddings: tuple[str, ...]
    head: str | None
    body: str | None
    tied: frozenset[str]
    """Names of parameters whose storage another name shares (every name of each group)."""
    family: Family = field(default_factory=Family)
    model_type: str = ""

    @property
    def layer_names(self) -> list[str]:
        """Dotted names of every repeated block, in order."""
        return [stack.layer_name(i) for stack in self.stacks for i in range(len(stack.layers))]

    def layer_of(self, name: str) -> str | None:
        """The block that holds the module or parameter `name`; None outside the blocks."""
        for stack in self.stacks:
            prefix = f"{stack.name}." if stack.name else ""
            if name.startswith(prefix):
                key = name[len(prefix) :].split(".", 1)[0]
                if key in stack.keys:
                    return prefix + key
        return None

    def is_attention(self, name: str) -> bool:
        """Whether a module or parameter inside a block belongs to its attention."""
        layer = self.layer_of(name)
        if layer is None:
            return False
        parts = name[len(layer) + 1 :].lower().split(".")
        return any(
            word in part for part in parts if "norm" not in part for word in _ATTENTION_NAMES
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What the trainer or the plain loop was told; takes part in conflicts like a strategy."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    accumulation_steps: int = 1
    """Micro-batches of one optimizer step; 0 means unknown (a plain loop decides as it goes)."""
    optimizer: str = "adamw"
    fp16: bool = False
    data_parallel: bool = False
    sharded: str | None = None
    """`"fsdp"` or `"deepspeed"` when one of them owns the parameters; or who sums gradients."""
    gradient_checkpointing: bool = False
    label_smoothing: float = 0.0
    custom_loss: bool = False
    liger_kernels: bool = False
    """Whether Liger's kernels serve the model, which write gradients over what they saved."""
    seed: int = 42
    stochastic_rounding: bool = True
    """Of bf16 weights, by the composed AdamW; torch's own rounds to the nearest."""

    @property
    def splits_parameters(self) -> bool:
        """Whether parameters are exchanged for parts of them once the optimizer is made."""
        return self.sharded in ("fsdp", "deepspeed")

    def __post_init__(self) -> None:
        for name, (argument, example) in _NUMBERS.items():
            if not is_number(getattr(self, name)):
                raise ValueError(
                    f"{argument}={getattr(self, name)!r}: must be a number, such as "
                    f"{argument}={example}"
                )
        _check_betas(self.betas)
        object.__setattr__(self, "betas", tuple(self.betas))
        check_seed(self.seed)
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"lr={self.learning_rate!r}: the learning rate must be 0 or more")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"eps={self.epsilon!r}: must be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay!r}: must be 0 or more")
        if not self.max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm!r}: must be 0 (off) or more")
        steps: Any = self.accumulation_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(
                f"accumulation_steps={steps!r}: must be a whole number, 0 where the loop decides "
                "window by window"
            )


_NUMBERS: Mapping[str, tuple[str, float]] = {
    "learning_rate": ("lr", 0.001),
    "epsilon": ("eps", 1e-8),
    "weight_decay": ("weight_decay", 0.1),
    "max_grad_norm": ("max_grad_norm", 1.0),
}
"""Settings that are numbers: what the user calls them, and an example."""


def _check_betas(betas: Any) -> None:
    pair = betas if isinstance(betas, (tuple, list)) else ()
    if len(pair) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in pair):
        raise ValueError(
            f"betas={betas!r}: both must lie in [0, 1); give two numbers, such as (0.9, 0.999)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a strategy's `check` and `claims` may look at; nothing in it may be changed."""

    model: nn.Module
    structure: Structure
    settings: RunSettings

    @property
    def config(self) -> Any:
        """The model's config, or None for a plain module."""
        return getattr(self.model, "config", None)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters, one name per storage."""
        return (item for item in self.model.named_parameters() if item[1].requires_grad)


def _block_lists(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Lists of like blocks with parameters, outermost only."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") or outer == "" for outer, _ in found):
            continue
        blocks = list(module.children())
        alike = len({type(block) for block in blocks}) == 1
        lists = isinstance(blocks[0], (nn.ModuleList, nn.ModuleDict))  # Funnel's: nothing runs them
        composite = not lists and all(any(True for _ in block.children()) for block in blocks)
        if alike and composite and any(True for _ in blocks[0].parameters()):
            found.append((name, module))
    return found


def _stacks(model: nn.Module) -> tuple[LayerStack, ...]:
    lists = _block_lists(model)
    # transformers marks its blocks with this attribute; prefer them to other lists of modules
    marked = [item for item in lists if hasattr(next(item[1].children()), "gradient_checkpointing")]
    return tuple(
        LayerStack(
            name=name,
            layers=tuple(module.children()),
            keys=tuple(key for key, _ in module.named_children()),
        )
        for name, module in marked or _considerable(lists)
    )


def _considerable(lists: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Lists that hold a good part of the model: all of an encoder-decoder, stages of any length."""
    repeated = [item for item in lists if len(list(item[1].children())) > 1] or lists
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in repeated]
    smallest = _SMALLEST_SHARE * max(sizes, default=0)
    return [item for item, size in zip(repeated, sizes, strict=True) if size >= smallest]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes y = x Wᵀ + b and nothing else, so that a strategy may do it."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or "forward" in vars(module):
        return False
    known = f"{kind.__module__}.{kind.__qualname__}" in PLAIN_LINEARS
    return known or kind.forward is nn.Linear.forward


def _accessor(model: nn.Module, method: str) -> nn.Module | None:
    get = getattr(model, method, None)
    if get is None:
        return None
    try:
        module = get()
    except NotImplementedError:
        return None
    return module if isinstance(module, nn.Module) else None


def _tied_names(model: nn.Module) -> frozenset[str]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return frozenset(name for group in groups.values() if len(group) > 1 for name in group)


def discover(model: nn.Module) -> Structure:
    """Find layers, embeddings, head and body of any model. Costs one walk over its modules."""
    names = {id(module): name for name, module in model.named_modules()}
    stacks = _stacks(model)
    inside = {id(m) for stack in stacks for layer in stack.layers for m in layer.modules()}
    embedding = _accessor(model, "get_input_embeddings")
    head = _accessor(model, "get_output_embeddings")
    embeddings = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and id(module) not in inside
    ]
    if embedding is not None and names.get(id(embedding)) not in embeddings:
        embeddings.append(names[id(embedding)])
    prefix = getattr(model, "base_model_prefix", "")
    body = prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else None
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    return Structure(
        stacks=stacks,
        embeddings=tuple(embeddings),
        head=names[id(head)] if head is not None else None,
        body=body,
        tied=_tied_names(model),
        family=FAMILIES.get(model_type, Family()),
        model_type=model_type,
    )
