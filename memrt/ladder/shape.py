"""The side network's blocks: the backbone's own architecture, made narrower.

A transformers body is built anew from its config with every width divided by the reduction; the
blocks, final norm and rotary embedding of that narrow body are what the ladder is made of. Heads
keep their width and become fewer (a head narrower than 16 suits no attention kernel); only when not
even one fits is its width reduced. Blocks of a plain module are copied with narrower linear layers
and norms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memrt.profiling.fake import is_fake
from memrt.structure import LayerStack

__all__ = [
    "MIN_HEAD_WIDTH",
    "Widths",
    "body_of",
    "drawing",
    "narrow_block",
    "narrow_body",
    "narrow_config",
    "plain_widths",
]

MIN_HEAD_WIDTH = 16

_WIDTH_KEYS = ("hidden_size", "word_embed_proj_dim")
_DIVIDED_KEYS = (
    "intermediate_size",
    "intermediate_size_mlp",  # of Llama 4
    "n_inner",
    "d_inner",  # of XLNet and Funnel
    "hidden_dim",  # of DistilBERT
    "dff",  # of CTRL
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",  # of the Granite MoEs; 0 is none
    "shared_experts_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "expert_ffn_hidden_size",
    "dense_intermediate_size",
    "prefix_dense_intermediate_size",
    "cross_attention_hidden_size",  # of an encoder that is as many times narrower
    "mamba_n_heads",  # of Bamba, Falcon H1 and the Granite hybrids, whose heads keep their width
    "mamba_num_heads",  # of Nemotron H
    "mamba_d_ssm",
)
_HEADS_IN_PARTS = {"codegen": 4}
"""Attention that takes its heads in so many equal parts, by the kind of the model."""

_HEAD_KEYS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
_KEY_HEAD_KEYS = ("num_key_value_heads", "num_kv_heads")
_VOCABULARY = 8  # of the narrow body, whose embeddings are not used


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """The widths of a transformer's body."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Widths:
        """Read them from a transformers config."""
        heads = int(config.num_attention_heads)
        hidden = int(config.hidden_size)
        given = (getattr(config, key, None) for key in _KEY_HEAD_KEYS)
        kv_heads = next((int(count) for count in given if count), heads)
        if getattr(config, "multi_query", False) and not getattr(
            config, "new_decoder_architecture", False
        ):
            kv_heads = 1
        return cls(
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        )

    def narrowed(self, reduction: int, *, own_head_dim: bool) -> Widths:
        """These widths divided by `reduction`, with sensible heads.

        `own_head_dim`: heads × head_dim need not be hidden.
        """
        hidden = _divided("hidden size", self.hidden, reduction)
        inner = hidden
        if own_head_dim:
            inner = _divided("width of the heads together", self.heads * self.head_dim, reduction)
        width = _head_width(inner, self.head_dim)
        if width is None:
            largest = self.heads * self.head_dim // MIN_HEAD_WIDTH
            raise ValueError(
                f"reduction={reduction} leaves {inner} channels for the side network's attention, "
                f"which make no heads of an even width of {MIN_HEAD_WIDTH} or more; use a "
                f"reduction of at most {max(1, largest)} that leaves a multiple of 8"
            )
        heads = inner // width
        group = self.heads // self.kv_heads
        kv_heads = next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= group)
        return Widths(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=width)


def _divided(what: str, size: int, reduction: int) -> int:
    if size % reduction or size < reduction:
        raise ValueError(
            f"reduction={reduction} does not divide the model's {what} of {size}; use a divisor"
        )
    return size // reduction


def _head_width(inner: int, head_dim: int) -> int | None:
    """The width of a side head: the backbone's where it fits, else the next smaller that does."""
    largest = min(max(head_dim, MIN_HEAD_WIDTH), inner)
    for multiple in (8, 2):
        for width in range(largest, MIN_HEAD_WIDTH - 1, -1):
            if (
                inner % width == 0
                and (width % multiple == 0 or width == head_dim)
                and not width % 2
            ):
                return width
    return None


def narrow_config(config: Any, reduction: int) -> Any:
    """A copy of a transformers config with every width divided by `reduction`."""
    narrow = copy.deepcopy(config)
    own_head_dim = _has_own_head_dim(config)
    wide = Widths.of(config)
    widths = _narrow_latent(wide, reduction) if _is_latent(config) else None
    widths = widths or wide.narrowed(reduction, own_head_dim=own_head_dim)
    if widths.head_dim != wide.head_dim and _lists_factors(config):
        raise ValueError(_needs_whole_heads(config, wide, reduction))
    parts = _HEADS_IN_PARTS.get(getattr(config, "model_type", ""), 1)
    if widths.heads % parts:
        raise ValueError(
            f"reduction={reduction} leaves {widths.heads} heads, and the attention of "
            f"{config.model_type} takes them in {parts} equal parts; use a smaller reduction"
        )
    for key in _DIVIDED_KEYS:
        size = getattr(config, key, None)
        if size:
            setattr(narrow, key, _divided(key, int(size), reduction))
    values = dict.fromkeys(_WIDTH_KEYS, widths.hidden)
    values |= dict.fromkeys(_HEAD_KEYS, widths.heads)
    values |= dict.fromkeys(_KEY_HEAD_KEYS, widths.kv_heads)
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    for key, value in values.items():
        if getattr(config, key, None) is not None:
            setattr(narrow, key, value)
    if own_head_dim and widths.head_dim != wide.head_dim:
        narrow.head_dim = widths.head_dim
        scale = getattr(config, "query_pre_attn_scalar", None)
        if scale is not None:
            narrow.query_pre_attn_scalar = type(scale)(scale * widths.head_dim / wide.head_dim)
    narrow.vocab_size = _VOCABULARY
    return narrow


def _lists_factors(config: Any) -> bool:
    """Whether rotary embeddings have a factor for each pair of a head's channels (longrope)."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [given, *(part for part in given.values() if isinstance(part, dict))]
    return any(part.get(key) for part in parts for key in ("short_factor", "long_factor"))


def _needs_whole_heads(config: Any, wide: Widths, reduction: int) -> str:
    fits = (r for r in range(reduction - 1, 0, -1) if _keeps_heads(config, wide, r))
    found = next(fits, None)
    remedy = "a model without" if found is None else f"reduction={found}"
    return (
        f"reduction={reduction} makes the heads narrower than {wide.head_dim} channels, for each "
        f"pair of which rope_scaling has a factor (longrope); use {remedy}"
    )


def _keeps_heads(config: Any, wide: Widths, reduction: int) -> bool:
    try:
        for size in filter(None, (getattr(config, key, None) for key in _DIVIDED_KEYS)):
            _divided("width", int(size), reduction)
        narrow = wide.narrowed(reduction, own_head_dim=_has_own_head_dim(config))
    except ValueError:
        return False
    return narrow.head_dim == wide.head_dim


def _has_own_head_dim(config: Any) -> bool:
    """Whether heads × head_dim need not be hidden."""
    derived = isinstance(getattr(type(config), "head_dim", None), property)
    return not derived and getattr(config, "head_dim", None) is not None


def _is_latent(config: Any) -> bool:
    """Attention through a latent state (DeepSeek's): parts of a head have sizes of their own."""
    return getattr(config, "qk_rope_head_dim", None) is not None


def _narrow_latent(wide: Widths, reduction: int) -> Widths:
    heads = max(1, wide.heads // reduction)
    hidden = _divided("hidden size", wide.hidden, reduction)
    return Widths(hidden=hidden, heads=heads, kv_heads=heads, head_dim=wide.head_dim)


def body_of(model: nn.Module, stack: LayerStack) -> str | None:
    """The name of the innermost transformers model around a stack; None in a plain module."""
    parts = stack.name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        name = ".".join(parts[:length])
        module = model.get_submodule(name)
        if hasattr(module, "config") and hasattr(module, "base_model_prefix"):
            return name
    return None


def narrow_body(body: nn.Module, reduction: int, *, like: torch.Tensor, seed: int) -> nn.Module:
    """A narrow body with weights drawn as transformers draws them; dtype and device of `like`."""
    config: Any = body.config
    with drawing(seed, like):
        narrow: nn.Module = type(body)(narrow_config(config, reduction))
    return narrow


@contextmanager
def drawing(seed: int, like: torch.Tensor) -> Iterator[None]:
    """Modules are made with the dtype, on the device and from the seed that are asked."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)
    try:
        with torch.device(like.device):
            if is_fake(like):
                yield
                return
            devices = [like.device] if like.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                yield
    finally:
        torch.set_default_dtype(before)


def plain_widths(block: nn.Module, reduction: int = 1) -> Widths:
    """The widths of a plain module's block, divided by `reduction`."""
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(
            f"the block {type(block).__name__} has no linear layer, so that nothing says how wide "
            "it is; use a transformers model, or blocks of torch.nn's layers"
        )
    hidden = linears[-1].out_features  # what the block gives back
    attention = [m for m in block.modules() if isinstance(m, nn.MultiheadAttention)]
    if attention:
        heads = attention[0].num_heads
        wide = Widths(hidden=hidden, heads=heads, kv_heads=heads, head_dim=hidden // heads)
        return wide.narrowed(reduction, own_head_dim=False)
    width = _divided("width", hidden, reduction)
    return Widths(hidden=width, heads=1, kv_heads=1, head_dim=width)


def narrow_block(
    block: nn.Module, reduction: int, *, hidden: int, like: torch.Tensor, seed: int
) -> nn.Module:
    """A copy of a plain block whose linear layers and norms are `reduction` times narrower."""
    with drawing(seed, like):
        leaves = {id(leaf): _narrow_leaf(leaf, reduction) for leaf in _leaves(block)}
    narrow: nn.Module = copy.deepcopy(block, dict(leaves))  # which deepcopy adds to
    # its parameters are the narrow leaves' alone, or the copy would still be as wide
    left = {id(p) for leaf in leaves.values() for p in leaf.parameters()}
    if any(id(parameter) not in left for parameter in narrow.parameters()):
        raise ValueError(_cannot_narrow(block, "it holds parameters of its own"))
    example = torch.zeros(1, 2, hidden // reduction, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad():
            shape = narrow.eval()(example).shape
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(_cannot_narrow(block, str(error).split("\n", maxsplit=1)[0])) from error
    if shape != example.shape:
        raise ValueError(_cannot_narrow(block, "it does not give back the shape that it takes"))
    return narrow


def _cannot_narrow(block: nn.Module, reason: str) -> str:
    return (
        f"a narrower copy of the block {type(block).__name__} cannot be made ({reason}); use a "
        "transformers model, or blocks of torch.nn's layers"
    )


def _leaves(block: nn.Module) -> list[nn.Module]:
    """Outermost modules that can be made narrower."""
    found: list[nn.Module] = []
    for child in block.children():
        known = isinstance(child, (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention))
        found.extend([child] if known else _leaves(child))
    return found


def _narrow_leaf(leaf: nn.Module, reduction: int) -> nn.Module:
    if isinstance(leaf, nn.Linear):
        wide = (leaf.in_features, leaf.out_features)
        first, second = (_divided("width", size, reduction) for size in wide)
        return nn.Linear(first, second, bias=leaf.bias is not None)
    if isinstance(leaf, (nn.LayerNorm, nn.RMSNorm)):
        width = _divided("width", leaf.normalized_shape[-1], reduction)
        kind: Any = type(leaf)
        return kind(width, eps=leaf.eps, elementwise_affine=leaf.elementwise_affine)  # type: ignore[no-any-return]
    assert isinstance(leaf, nn.MultiheadAttention)
    width = _divided("width", leaf.embed_dim, reduction)
    head = _head_width(width, leaf.head_dim)
    if head is None:
        raise ValueError(
            f"reduction={reduction} leaves {width} channels, which make no heads of an even width "
            f"of {MIN_HEAD_WIDTH} or more; use a smaller reduction"
        )
    return nn.MultiheadAttention(
        width,
        width // head,
        dropout=leaf.dropout,
        bias=leaf.in_proj_bias is not None,
        batch_first=leaf.batch_first,
    )
