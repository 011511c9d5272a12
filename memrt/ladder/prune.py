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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memrt.ladder.fisher import Scores
from memrt.ladder.narrowing import Narrowing
from memrt.ladder.roles import (
    FUSED,
    GATED,
    HEAD_DIM,
    HIDDEN,
    INTERLEAVED,
    KEY,
    NEURON,
    QUERY,
    Cut,
    Weight,
    attention_group,
    head_ratio,
    is_transposed,
    roles_of,
    sizes_of,
)
from memrt.ladder.shape import Widths

__all__ = ["copy_hidden", "copy_pruned", "hidden_channels"]

# ---------------------------------------------------------------- which to keep


def hidden_channels(blocks: Sequence[nn.Module], cut: Cut, scores: Scores | None = None) -> Tensor:
    """The hidden channels that the side keeps, in order: one set for all blocks."""
    score: Tensor | None = None
    for block in blocks:
        for weight in roles_of(block, cut.wide, scores).weights:
            for axis, role in enumerate((weight.out_role, weight.in_role)):
                if role == HIDDEN:
                    norms = weight.norms(axis)
                    score = norms if score is None else score + norms
    assert score is not None
    return _top(score, cut.narrow.hidden)


def _top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest along the last dimension, in order."""
    best = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return best.sort(dim=-1).values


def _head_sets(weights: Sequence[Weight], cut: Cut) -> tuple[Tensor, Tensor]:
    """The query heads and key-value heads that one attention keeps."""
    wide, narrow = cut.wide, cut.narrow
    num_query, num_key = narrow.heads * head_ratio(cut), narrow.kv_heads * head_ratio(cut)
    group = wide.heads // wide.kv_heads
    query, key = _head_scores(weights, wide)
    keys = _top(key, num_key)  # [num_key]
    grouped = query.view(wide.kv_heads, group).index_select(0, keys)  # [num_key, group]
    inside = _top(grouped, num_query // num_key)
    return (keys[:, None] * group + inside).flatten(), keys


def _head_scores(weights: Sequence[Weight], wide: Widths) -> tuple[Tensor, Tensor]:
    """Scores of query heads [heads] and of key-value heads [kv heads] with their group."""
    query = key = None
    for weight in weights:
        role = weight.in_role if weight.out_role == HIDDEN else weight.out_role
        norms = weight.norms(1 if weight.out_role == HIDDEN else 0)
        of_query, of_key = _split_scores(norms, role, wide)
        query = of_query if query is None else query if of_query is None else query + of_query
        key = of_key if key is None else key if of_key is None else key + of_key
    assert query is not None
    grouped = query.view(wide.kv_heads, -1).sum(dim=1)
    return query, grouped if key is None else key + grouped


def _split_scores(norms: Tensor, role: str, wide: Widths) -> tuple[Tensor | None, Tensor | None]:
    by_head = norms.view(-1, wide.head_dim).sum(dim=1)
    if role == QUERY:
        return by_head, None
    if role == KEY:
        return None, by_head
    if role == FUSED:
        query, key, value = torch.split(by_head, [wide.heads, wide.kv_heads, wide.kv_heads])
        return query, key + value
    return by_head.view(-1, 3).sum(dim=1), None


def _kept_channels(cut: Cut, device: torch.device) -> Tensor:
    """Channels of a head that are kept, evenly spread over both halves of a rotation."""
    wide, narrow = cut.wide.head_dim, min(cut.narrow.head_dim, cut.wide.head_dim)
    half = torch.arange(narrow // 2, device=device) * (wide // 2) // (narrow // 2)
    return torch.cat([half, half + wide // 2])


def _of_heads(heads: Tensor, channels: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + channels).flatten()


def _sets_of(
    group: str, weights: Sequence[Weight], cut: Cut, num_neurons: int
) -> dict[str, Tensor]:
    """For every role in one attention or MLP, what is kept."""
    if group == "mlp":
        parts = []
        for weight in weights:
            norms = weight.norms(1 if weight.out_role == HIDDEN else 0)
            parts.append(norms.view(2, -1).sum(dim=0) if weight.out_role == GATED else norms)
        score = torch.stack(parts).sum(dim=0)
        kept = _top(score, num_neurons)
        return {NEURON: kept, GATED: torch.cat([kept, kept + score.shape[0]])}
    queries, keys = _head_sets(weights, cut)
    wide = cut.wide
    channels = _kept_channels(cut, queries.device)
    query = _of_heads(queries, channels, wide.head_dim)
    key = _of_heads(keys, channels, wide.head_dim)
    offset = wide.heads * wide.head_dim
    width = wide.kv_heads * wide.head_dim
    three = queries[:, None] * 3 + torch.arange(3, device=queries.device)
    return {
        QUERY: query,
        KEY: key,
        FUSED: torch.cat([query, key + offset, key + offset + width]),
        INTERLEAVED: _of_heads(three.flatten(), channels, wide.head_dim),
        HEAD_DIM: channels.repeat(head_ratio(cut)),
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
    roles = roles_of(source, cut.wide, scores)
    modules = dict(target.named_modules())
    sets: dict[str, dict[str, Tensor]] = {}
    for group, weights in roles.groups.items():
        num_neurons = sizes_of(modules[weights[-1].name])[1]
        sets[group] = _sets_of(group, weights, cut, num_neurons)
        for weight in weights:
            _copy_linear(weight, modules[weight.name], sets[group], narrowing)
    linear = {weight.name for weight in roles.weights}
    for name, parameter in target.named_parameters():
        owner, _, _ = name.rpartition(".")
        if owner in linear:
            continue
        wide = source.get_parameter(name).detach()
        own = sets.get(attention_group(owner) or "mlp", {})
        if name.endswith(("in_proj_weight", "in_proj_bias")):  # of nn.MultiheadAttention
            rows = wide.index_select(0, own[FUSED])
            _copy(parameter, narrowing.along(rows, 1) if rows.ndim == 2 else rows)
            continue
        if name.endswith("relative_attention_bias.weight"):  # [distances, heads]
            _copy(parameter, wide.index_select(1, own["heads"][: parameter.shape[1]]))
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
    weight: Weight, target: nn.Module, sets: dict[str, Tensor], narrowing: Narrowing
) -> None:
    def along(tensor: Tensor, axis: int, role: str) -> Tensor:
        if role == HIDDEN:
            return narrowing.along(tensor, axis)
        return tensor.index_select(axis, sets[role])

    # heads and neurons first: what is multiplied is then small
    axes = sorted(enumerate((weight.out_role, weight.in_role)), key=lambda each: each[1] == HIDDEN)
    cut = weight.dense()
    for axis, role in axes:
        cut = along(cut, axis, role)
    parameter, bias = target.weight, target.bias
    assert isinstance(parameter, Tensor)
    _copy(parameter, cut.t() if is_transposed(target) else cut)
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
        return sets[HEAD_DIM]
    return sets[QUERY if leaf == "q_norm" else KEY]


def copy_hidden(source: nn.Module, target: nn.Module, narrowing: Narrowing) -> None:
    """Fill a norm over hidden channels."""
    for name, parameter in target.named_parameters():
        _copy(parameter, narrowing.of_norm(source, name))


def _copy(target: Tensor, source: Tensor) -> None:
    assert target.shape == source.shape, "check_prunable let through what does not fit"
    with torch.no_grad():
        target.copy_(source)
