"""Starting weights cut out of the backbone's: whole heads, one set of channels for all layers.

Every weight of a side block is a sub-matrix of the backbone's weight of the same name; with another
`Narrowing` than a selection, of its product with directions of the hidden state. The axes of a
weight have *roles*: hidden channels, query heads, key-value heads, neurons. One set of hidden
channels serves the whole model, so that a channel of the side's residual stream means one channel
of the backbone's in every layer; heads and neurons are chosen layer by layer, whole heads within
whole key-value groups, gate, up and down projection together. The score of a channel, head or
neuron is the L1 norm of what would be kept of it, or of its Fisher information
(`memrt.ladder.fisher`), each weight's norms divided by their sum.

LST (arXiv 2206.06522, the magnitude variant of its appendix) chooses rows operator by operator and
cuts across heads; here the residual stream and the heads stay consistent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from memrt.ladder.fisher import Scores
from memrt.ladder.narrowing import Narrowing
from memrt.ladder.shape import Widths

__all__ = ["Cut", "check_prunable", "copy_hidden", "copy_pruned", "hidden_channels", "linears"]

_HIDDEN, _NEURON, _QUERY, _KEY, _FUSED, _INTERLEAVED, _GATED, _HEAD_DIM = (
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
class _Weight:
    """A linear weight of a block with the roles of its two axes."""

    name: str
    module: nn.Module
    out_role: str
    in_role: str
    scored: tuple[Tensor, Tensor] | None = None

    def dense(self) -> Tensor:
        """[out, in]."""
        weight = dense_weight(self.module)
        return weight.t() if _is_transposed(self.module) else weight

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
class _Roles:
    """The weights of one block, by what they are part of."""

    weights: list[_Weight] = field(default_factory=list)
    groups: dict[str, list[_Weight]] = field(default_factory=dict)
    """Weights that share heads (one attention) or neurons (one MLP)."""


def dense_weight(module: nn.Module) -> Tensor:
    """A module's weight as numbers, whatever it is stored in."""
    weight, dense = module.weight, getattr(module, "dense", None)
    assert isinstance(weight, Tensor)
    # packed layers (`nf4`, `int8`) make theirs from what they hold
    made: Tensor = weight.detach() if dense is None else dense(weight.detach())
    return made


def _is_transposed(module: nn.Module) -> bool:
    """transformers' `Conv1D`: the weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _attention_group(name: str) -> str | None:
    """The attention that a module inside a block belongs to, by its path."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if "attn" in part.lower() or "attention" in part.lower():
            # T5 and BERT nest one attention in another's name
            return ".".join(parts[: index + 1])
    return None


def linears(blocks: Sequence[nn.Module], cut: Cut) -> list[nn.Module]:
    """The modules of these blocks' linear weights."""
    return [weight.module for block in blocks for weight in _roles(block, cut.wide).weights]


def _roles(block: nn.Module, wide: Widths, scores: Scores | None = None) -> _Roles:
    """What every axis of every linear weight of a block is."""
    found = _Roles()
    linears = [(name, m) for name, m in block.named_modules() if _is_linear(m)]
    grouped: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in linears:
        grouped.setdefault(_attention_group(name) or "mlp", []).append((name, module))
    for group, members in grouped.items():
        weights = list(_mlp(members, wide) if group == "mlp" else _attention(members, wide))
        if scores is not None:
            weights = [replace(weight, scored=scores[weight.module]) for weight in weights]
        found.weights.extend(weights)
        found.groups[group] = weights
    return found


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):  # a quantised weight has another shape
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1]), int(weight.shape[0])


def _attention(members: Sequence[tuple[str, nn.Module]], wide: Widths) -> Iterator[_Weight]:
    query = wide.heads * wide.head_dim
    output = None
    for name, module in members:
        out_size, in_size = _sizes(module)
        role = _projection(name.rpartition(".")[2].lower(), out_size, wide)
        if role is not None and in_size == wide.hidden:
            yield _Weight(name=name, module=module, out_role=role, in_role=_HIDDEN)
        elif output is None and (in_size, out_size) == (query, wide.hidden):
            output = _Weight(name=name, module=module, out_role=_HIDDEN, in_role=_QUERY)
        else:
            raise _unknown(name, module)
    if output is not None:
        yield output


def _projection(leaf: str, size: int, wide: Widths) -> str | None:
    """What a projection of the hidden state makes, by its name and size."""
    query, key = wide.heads * wide.head_dim, wide.kv_heads * wide.head_dim
    if leaf in _BY_HEAD and size == query + 2 * key:
        if wide.kv_heads == wide.heads:
            return _INTERLEAVED
        return _FUSED if wide.kv_heads == 1 else None
    if leaf in _CONCATENATED and size == query + 2 * key:
        return _FUSED
    if leaf in _QUERY_NAMES and size == query:
        return _QUERY
    return _KEY if leaf in _KEY_NAMES and size == key else None


def _mlp(members: Sequence[tuple[str, nn.Module]], wide: Widths) -> Iterator[_Weight]:
    last_name, last = members[-1]
    out_size, neurons = _sizes(last)
    if out_size != wide.hidden:
        raise _unknown(last_name, last)
    for name, module in members[:-1]:
        size, in_size = _sizes(module)
        if in_size != wide.hidden or size not in (neurons, 2 * neurons):
            raise _unknown(name, module)
        role = _NEURON if size == neurons else _GATED
        yield _Weight(name=name, module=module, out_role=role, in_role=_HIDDEN)
    yield _Weight(name=last_name, module=last, out_role=_HIDDEN, in_role=_NEURON)


def _unknown(name: str, module: nn.Module) -> ValueError:
    out_size, in_size = _sizes(module)
    return ValueError(
        f"the weight {name} of {out_size} x {in_size} has a place in its block that pruning does "
        "not know; use ladder(init='random')"
    )


def check_prunable(blocks: Sequence[nn.Module], cut: Cut) -> None:
    """Refuse with `ValueError` what cannot be cut out of these blocks; computes nothing."""
    wide, narrow, ratio = cut.wide, cut.narrow, _head_ratio(cut)
    attends = any(_attention_group(name) for name, _ in blocks[0].named_modules())
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
        linear = {weight.name for weight in _roles(block, wide).weights}
        for name, parameter in block.named_parameters():
            if name.rpartition(".")[0] not in linear and not _is_known_vector(name, parameter, cut):
                raise ValueError(
                    f"the parameter {name} of shape {list(parameter.shape)} has a place in its "
                    "block that pruning does not know; use ladder(init='random')"
                )


def _is_known_vector(name: str, parameter: Tensor, cut: Cut) -> bool:
    wide = cut.wide
    if name.endswith(("in_proj_weight", "in_proj_bias", "relative_attention_bias.weight")):
        return True
    sizes = [wide.hidden]
    if f".{name}".rpartition(".")[0].endswith(("q_norm", "k_norm")):
        sizes += [wide.head_dim, wide.heads * wide.head_dim, wide.kv_heads * wide.head_dim]
    return parameter.ndim == 1 and parameter.shape[0] in sizes


# ---------------------------------------------------------------- which to keep


def hidden_channels(blocks: Sequence[nn.Module], cut: Cut, scores: Scores | None = None) -> Tensor:
    """The hidden channels that the side keeps, in order: one set for all blocks."""
    score: Tensor | None = None
    for block in blocks:
        for weight in _roles(block, cut.wide, scores).weights:
            for axis, role in enumerate((weight.out_role, weight.in_role)):
                if role == _HIDDEN:
                    norms = weight.norms(axis)
                    score = norms if score is None else score + norms
    assert score is not None
    return _top(score, cut.narrow.hidden)


def _top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest along the last dimension, in order."""
    best = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return best.sort(dim=-1).values


def _head_sets(weights: Sequence[_Weight], cut: Cut) -> tuple[Tensor, Tensor]:
    """The query heads and key-value heads that one attention keeps."""
    wide, narrow = cut.wide, cut.narrow
    num_query, num_key = narrow.heads * _head_ratio(cut), narrow.kv_heads * _head_ratio(cut)
    group = wide.heads // wide.kv_heads
    query, key = _head_scores(weights, wide)
    keys = _top(key, num_key)  # [num_key]
    grouped = query.view(wide.kv_heads, group).index_select(0, keys)  # [num_key, group]
    inside = _top(grouped, num_query // num_key)
    return (keys[:, None] * group + inside).flatten(), keys


def _head_scores(weights: Sequence[_Weight], wide: Widths) -> tuple[Tensor, Tensor]:
    """Scores of query heads [heads] and of key-value heads [kv heads] with their group."""
    query = key = None
    for weight in weights:
        role = weight.in_role if weight.out_role == _HIDDEN else weight.out_role
        norms = weight.norms(1 if weight.out_role == _HIDDEN else 0)
        of_query, of_key = _split_scores(norms, role, wide)
        query = of_query if query is None else query if of_query is None else query + of_query
        key = of_key if key is None else key if of_key is None else key + of_key
    assert query is not None
    grouped = query.view(wide.kv_heads, -1).sum(dim=1)
    return query, grouped if key is None else key + grouped


def _split_scores(norms: Tensor, role: str, wide: Widths) -> tuple[Tensor | None, Tensor | None]:
    by_head = norms.view(-1, wide.head_dim).sum(dim=1)
    if role == _QUERY:
        return by_head, None
    if role == _KEY:
        return None, by_head
    if role == _FUSED:
        query, key, value = torch.split(by_head, [wide.heads, wide.kv_heads, wide.kv_heads])
        return query, key + value
    return by_head.view(-1, 3).sum(dim=1), None


def _kept_channels(cut: Cut, device: torch.device) -> Tensor:
    """Channels of a head that are kept, evenly spread over both halves of a rotation."""
    wide, narrow = cut.wide.head_dim, min(cut.narrow.head_dim, cut.wide.head_dim)
    half = torch.arange(narrow // 2, device=device) * (wide // 2) // (narrow // 2)
    return torch.cat([half, half + wide // 2])


def _head_ratio(cut: Cut) -> int:
    """Of how many of the backbone's heads a wider side head takes the channels."""
    return max(1, cut.narrow.head_dim // cut.wide.head_dim)


def _of_heads(heads: Tensor, channels: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + channels).flatten()


def _sets_of(
    group: str, weights: Sequence[_Weight], cut: Cut, num_neurons: int
) -> dict[str, Tensor]:
    """For every role in one attention or MLP, what is kept."""
    if group == "mlp":
        parts = []
        for weight in weights:
            norms = weight.norms(1 if weight.out_role == _HIDDEN else 0)
            parts.append(norms.view(2, -1).sum(dim=0) if weight.out_role == _GATED else norms)
        score = torch.stack(parts).sum(dim=0)
        kept = _top(score, num_neurons)
        return {_NEURON: kept, _GATED: torch.cat([kept, kept + score.shape[0]])}
    queries, keys = _head_sets(weights, cut)
    wide = cut.wide
    channels = _kept_channels(cut, queries.device)
    query = _of_heads(queries, channels, wide.head_dim)
    key = _of_heads(keys, channels, wide.head_dim)
    offset = wide.heads * wide.head_dim
    width = wide.kv_heads * wide.head_dim
    three = queries[:, None] * 3 + torch.arange(3, device=queries.device)
    return {
        _QUERY: query,
        _KEY: key,
        _FUSED: torch.cat([query, key + offset, key + offset + width]),
        _INTERLEAVED: _of_heads(three.flatten(), channels, wide.head_dim),
        _HEAD_DIM: channels.repeat(_head_ratio(cut)),
        "heads": queries,
    }


# ---------------------------------------------------------------- copying


def copy_pruned(
    source: nn.Module,
    target: nn.Module,
    cut: Cut,
    narrowing: Narrowing,
    scores: Scores | None = None,
) -> Tensor | None:
    """Fill a side block from its backbone block; returns the query heads of its self-attention."""
    roles = _roles(source, cut.wide, scores)
    modules = dict(target.named_modules())
    sets: dict[str, dict[str, Tensor]] = {}
    for group, weights in roles.groups.items():
        num_neurons = _sizes(modules[weights[-1].name])[1]
        sets[group] = _sets_of(group, weights, cut, num_neurons)
        for weight in weights:
            _copy_linear(weight, modules[weight.name], sets[group], narrowing)
    linear = {weight.name for weight in roles.weights}
    for name, parameter in target.named_parameters():
        owner, _, _ = name.rpartition(".")
        if owner in linear:
            continue
        wide = source.get_parameter(name).detach()
        own = sets.get(_attention_group(owner) or "mlp", {})
        if name.endswith(("in_proj_weight", "in_proj_bias")):  # of nn.MultiheadAttention
            rows = wide.index_select(0, own[_FUSED])
            _copy(parameter, narrowing.along(rows, 1) if rows.ndim == 2 else rows)
            continue
        kept = _of_heads_norm(name, wide, cut, own)
        if kept is not None:
            _copy(parameter, wide.index_select(0, kept))
        else:
            norm = source.get_submodule(owner)
            _copy(parameter, narrowing.of_norm(norm, name.rpartition(".")[2]))
    first = next((group for group in sets if group != "mlp"), None)
    return None if first is None else sets[first]["heads"]


def _copy_linear(
    weight: _Weight, target: nn.Module, sets: dict[str, Tensor], narrowing: Narrowing
) -> None:
    def along(tensor: Tensor, axis: int, role: str) -> Tensor:
        if role == _HIDDEN:
            return narrowing.along(tensor, axis)
        return tensor.index_select(axis, sets[role])

    # heads and neurons first: what is multiplied is then small
    axes = sorted(enumerate((weight.out_role, weight.in_role)), key=lambda each: each[1] == _HIDDEN)
    cut = weight.dense()
    for axis, role in axes:
        cut = along(cut, axis, role)
    parameter, bias = target.weight, target.bias
    assert isinstance(parameter, Tensor)
    _copy(parameter, cut.t() if _is_transposed(target) else cut)
    if isinstance(bias, Tensor):
        wide = weight.module.bias
        assert isinstance(wide, Tensor)
        _copy(bias, along(wide.detach(), 0, weight.out_role))


def _of_heads_norm(name: str, wide: Tensor, cut: Cut, sets: dict[str, Tensor]) -> Tensor | None:
    """What is kept of a norm over heads' channels; None for one over hidden channels."""
    leaf = name.split(".")[-2].lower() if "." in name else ""
    if wide.ndim != 1 or leaf not in ("q_norm", "k_norm"):
        return None
    if wide.shape[0] == cut.wide.head_dim:
        return sets[_HEAD_DIM]
    return sets[_QUERY if leaf == "q_norm" else _KEY]


def copy_hidden(source: nn.Module, target: nn.Module, narrowing: Narrowing) -> None:
    """Fill a norm over hidden channels."""
    for name, parameter in target.named_parameters():
        _copy(parameter, narrowing.of_norm(source, name))


def _copy(target: Tensor, source: Tensor) -> None:
    assert target.shape == source.shape, "check_prunable let through what does not fit"
    with torch.no_grad():
        target.copy_(source)
