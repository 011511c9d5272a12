"""What the axes of a block's weights are: hidden channels, query heads, key-value heads, neurons.

Found by names and sizes, in one attention or MLP after the other. What has no place among these
is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from memrt.ladder.fisher import Scores
from memrt.ladder.shape import Widths

__all__ = [
    "FUSED",
    "GATED",
    "HEAD_DIM",
    "HIDDEN",
    "INTERLEAVED",
    "KEY",
    "NEURON",
    "QUERY",
    "Cut",
    "Roles",
    "Weight",
    "attention_group",
    "check_prunable",
    "head_ratio",
    "is_transposed",
    "linears",
    "roles_of",
    "sizes_of",
]

HIDDEN, NEURON, QUERY, KEY, FUSED, INTERLEAVED, GATED, HEAD_DIM = (
    "hidden",
    "neuron",
    "query",
    "key",
    "query, key and value",
    "query, key and value of each head",
    "gate and up",
    "head channel",
)
_QUERY_NAMES = ("q", "q_proj", "query", "wq", "q_norm")
_KEY_NAMES = ("k", "v", "k_proj", "v_proj", "key", "value", "wk", "wv", "k_norm")
_CONCATENATED = ("c_attn", "qkv_proj", "wqkv", "qkv")
_BY_HEAD = ("query_key_value",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """From which widths to which, of one body."""

    wide: Widths
    narrow: Widths


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A linear weight of a block with the roles of its two axes."""

    name: str
    module: nn.Module
    out_role: str
    in_role: str
    scored: tuple[Tensor, Tensor] | None = None

    def dense(self) -> Tensor:
        """[out, in]."""
        weight = dense_weight(self.module)
        return weight.t() if is_transposed(self.module) else weight

    def norms(self, axis: int) -> Tensor:
        """Scores, or L1 norms, along the other axis, with a sum of one; fp32 or wider."""
        if self.scored is None:
            dense = self.dense()
            dtype = torch.promote_types(dense.dtype, torch.float32)
            found: Tensor = torch.linalg.vector_norm(dense, 1, dim=1 - axis, dtype=dtype)
        else:
            found = self.scored[axis]
        return found / found.sum().clamp_(min=torch.finfo(found.dtype).tiny)


@dataclass(slots=True, kw_only=True)
class Roles:
    """The weights of one block, by what they are part of."""

    weights: list[Weight] = field(default_factory=list)
    groups: dict[str, list[Weight]] = field(default_factory=dict)
    """Weights that share heads (one attention) or neurons (one MLP)."""


def dense_weight(module: nn.Module) -> Tensor:
    """A module's weight as numbers, whatever it is stored in."""
    weight, dense = module.weight, getattr(module, "dense", None)
    assert isinstance(weight, Tensor)
    # packed layers (`nf4`, `int8`) make theirs from what they hold
    made: Tensor = weight.detach() if dense is None else dense(weight.detach())
    return made


def is_transposed(module: nn.Module) -> bool:
    """transformers' `Conv1D`: the weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def attention_group(name: str) -> str | None:
    """The attention that a module inside a block belongs to, by its path."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if "attn" in part.lower() or "attention" in part.lower():
            # T5 and BERT nest one attention in another's name
            return ".".join(parts[: index + 1])
    return None


def linears(blocks: Sequence[nn.Module], cut: Cut) -> list[nn.Module]:
    """The modules of these blocks' linear weights."""
    return [weight.module for block in blocks for weight in roles_of(block, cut.wide).weights]


def roles_of(block: nn.Module, wide: Widths, scores: Scores | None = None) -> Roles:
    """What every axis of every linear weight of a block is."""
    found = Roles()
    linears = [(name, m) for name, m in block.named_modules() if _is_linear(m)]
    grouped: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in linears:
        grouped.setdefault(attention_group(name) or "mlp", []).append((name, module))
    for group, members in grouped.items():
        weights = list(_mlp(members, wide) if group == "mlp" else _attention(members, wide))
        if scores is not None:
            weights = [replace(weight, scored=scores[weight.module]) for weight in weights]
        found.weights.extend(weights)
        found.groups[group] = weights
    return found


def sizes_of(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):  # a quantised weight has another shape
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1]), int(weight.shape[0])


def _attention(members: Sequence[tuple[str, nn.Module]], wide: Widths) -> Iterator[Weight]:
    query = wide.heads * wide.head_dim
    output = None
    for name, module in members:
        out_size, in_size = sizes_of(module)
        role = _projection(name.rpartition(".")[2].lower(), out_size, wide)
        if role is not None and in_size == wide.hidden:
            yield Weight(name=name, module=module, out_role=role, in_role=HIDDEN)
        elif output is None and (in_size, out_size) == (query, wide.hidden):
            output = Weight(name=name, module=module, out_role=HIDDEN, in_role=QUERY)
        else:
            raise _unknown(name, module)
    if output is not None:
        yield output


def _projection(leaf: str, size: int, wide: Widths) -> str | None:
    """What a projection of the hidden state makes, by its name and size."""
    query, key = wide.heads * wide.head_dim, wide.kv_heads * wide.head_dim
    if leaf in _BY_HEAD and size == query + 2 * key:
        if wide.kv_heads == wide.heads:
            return INTERLEAVED
        return FUSED if wide.kv_heads == 1 else None
    if leaf in _CONCATENATED and size == query + 2 * key:
        return FUSED
    if leaf in _QUERY_NAMES and size == query:
        return QUERY
    return KEY if leaf in _KEY_NAMES and size == key else None


def _mlp(members: Sequence[tuple[str, nn.Module]], wide: Widths) -> Iterator[Weight]:
    last_name, last = members[-1]
    out_size, neurons = sizes_of(last)
    if out_size != wide.hidden:
        raise _unknown(last_name, last)
    for name, module in members[:-1]:
        size, in_size = sizes_of(module)
        if in_size != wide.hidden or size not in (neurons, 2 * neurons):
            raise _unknown(name, module)
        role = NEURON if size == neurons else GATED
        yield Weight(name=name, module=module, out_role=role, in_role=HIDDEN)
    yield Weight(name=last_name, module=last, out_role=HIDDEN, in_role=NEURON)


def _unknown(name: str, module: nn.Module) -> ValueError:
    out_size, in_size = sizes_of(module)
    return ValueError(
        f"the weight {name} of {out_size} x {in_size} has a place in its block that pruning does "
        "not know; use ladder(init='random')"
    )


def check_prunable(blocks: Sequence[nn.Module], cut: Cut) -> None:
    """Refuse with `ValueError` what cannot be cut out of these blocks; computes nothing."""
    wide, narrow, ratio = cut.wide, cut.narrow, head_ratio(cut)
    attends = any(attention_group(name) for name, _ in blocks[0].named_modules())
    group = wide.heads // wide.kv_heads
    wider = narrow.head_dim > wide.head_dim and narrow.head_dim % wide.head_dim
    if attends and (
        wider or narrow.kv_heads * ratio > wide.kv_heads or narrow.heads > narrow.kv_heads * group
    ):
        raise ValueError(
            f"the side's {narrow.heads} heads of {narrow.head_dim} channels cannot be cut out of "
            f"{wide.heads} heads of {wide.head_dim}; use ladder(init='random')"
        )
    for block in blocks:
        weights = roles_of(block, wide).weights
        for weight in weights:
            _require_numbers(weight)
        linear = {weight.name for weight in weights}
        for name, parameter in block.named_parameters():
            if name.rpartition(".")[0] not in linear and not _is_known_vector(name, parameter, cut):
                raise ValueError(
                    f"the parameter {name} of shape {list(parameter.shape)} has a place in its "
                    "block that pruning does not know; use ladder(init='random')"
                )


def _require_numbers(weight: Weight) -> None:
    """Bytes of another library's quantised layer say nothing without its scales."""
    stored = weight.module.weight
    assert isinstance(stored, Tensor)
    plain = stored.is_floating_point() and stored.dtype.itemsize > 1
    if not plain and not hasattr(weight.module, "dense"):
        raise ValueError(
            f"the weight {weight.name} of a {type(weight.module).__name__} is stored as "
            f"{stored.dtype}, which pruning cannot read; use ladder(init='random'), or load the "
            "model with memrt's own nf4 or int8"
        )


def _is_known_vector(name: str, parameter: Tensor, cut: Cut) -> bool:
    wide = cut.wide
    if name.endswith(("in_proj_weight", "in_proj_bias", "relative_attention_bias.weight")):
        return True
    sizes = [wide.hidden]
    if f".{name}".rpartition(".")[0].endswith(("q_norm", "k_norm")):
        sizes += [wide.head_dim, wide.heads * wide.head_dim, wide.kv_heads * wide.head_dim]
    return parameter.ndim == 1 and parameter.shape[0] in sizes


def head_ratio(cut: Cut) -> int:
    """Of how many of the backbone's heads a wider side head takes the channels."""
    return max(1, cut.narrow.head_dim // cut.wide.head_dim)
