"""A ladder beside a frozen backbone: where it starts, what it keeps, what it refuses."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memrt
from memrt.errors import ConflictError
from memrt.ladder.attach import CHILD
from memrt.ladder.shape import Widths
from memrt.packed_weights import packed_layers, unpack
from memrt.planning import plan
from memrt.profiling.accounts import Account
from memrt.runner import model_loss
from memrt.session import Session
from memrt.testing import FAMILIES
from tests.strategies.runs import assert_equal, batch_of, counted, model_of, one_pass

NARROW = "ladder(reduction=2)"
WITHOUT_DROPOUT = {"attention_dropout": 0.0}


def ladder(model: nn.Module, **settings: Any) -> Session:
    given = ", ".join(f"{name}={value!r}" for name, value in {"reduction": 2, **settings}.items())
    return memrt.prepare(model, [f"ladder({given})"], lr=1e-2)


def logits(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch)["logits"]
    return result


def side_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if CHILD in name.split(".")}


def step(session: Session, batch: Any) -> Tensor:
    loss = session.train_micro_batch(lambda: model_loss(session.model, batch))
    session.step()
    return loss


# ---------------------------------------------------------------- where it starts, what trains


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"taps": "low_rank", "gate": "vector"}], ids=str)
def test_starts_as_the_backbone_to_the_bit_in_training_too(
    family: str, settings: dict[str, Any]
) -> None:
    """With dropout in the model: the backbone drops nothing out, as in evaluation."""
    model = model_of(family)
    batch = batch_of(family)
    expected = logits(model.eval(), batch)
    session = ladder(model.train(), **settings)
    assert torch.equal(logits(model, batch), expected)
    step(session, batch)
    step(session, batch)
    assert not torch.equal(logits(model, batch), expected)
    session.detach()
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model.eval(), batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_side_network_alone_trains_and_no_graph_reaches_the_backbone(family: str) -> None:
    model = model_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session = ladder(model)
    reached: list[bool] = []
    blocks = session.facts.structure.stacks[0].layers
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: reached.append(out.requires_grad))
        for block in blocks[:-1]
    ]
    side = {name: p.detach().clone() for name, p in model.named_parameters() if CHILD in name}
    with session.micro_batch():
        session.backward(model_loss(model, batch_of(family)))
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    session.step()
    step(session, batch_of(family, seed=1))
    assert reached == [False] * 2 * len(hooks)
    assert graded == side_names(model)
    moved = {n for n, p in model.named_parameters() if n in side and not torch.equal(p, side[n])}
    assert moved == side_names(model)
    assert_equal({n: t for n, t in model.state_dict().items() if CHILD not in n}, before)


def test_trains_beside_a_backbone_that_was_loaded_in_four_bits() -> None:
    from memrt.testing import tiny_config

    stack = ["nf4", "ladder(reduction=4)", "int8_states", "fused_loss(chunk_tokens=8)"]
    model = memrt.load(tiny_config("llama", hidden=64), stack, seed=0)
    batch = batch_of("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model.eval(), batch)
    session = memrt.prepare(model.train(), stack, lr=1e-2)
    assert torch.equal(logits(model.eval(), batch), expected)
    model.train()
    losses = [float(step(session, batch)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert_equal({n: t for n, t in model.state_dict().items() if CHILD not in n}, before)


WEIGHT = "model.layers.0.mlp.up_proj.weight"


def test_taps_of_a_four_bit_base_are_those_of_its_rounded_weights() -> None:
    """So they differ from the whole model's by the rounding of its weights, and by nothing else."""
    from memrt.testing import tiny_config

    def hidden_states(model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        session = memrt.prepare(model.eval(), ["ladder(reduction=4)"])
        hooks = [
            block.register_forward_hook(lambda _m, _i, out: found.append(out.detach().clone()))
            for block in session.facts.structure.stacks[0].layers
        ]
        logits(model, batch_of("llama"))
        for hook in hooks:
            hook.remove()
        return found

    config = tiny_config("llama", hidden=64)
    packed = memrt.load(config, ["nf4"], seed=0)
    rounded = memrt.load(config, ["nf4"], seed=0)
    for _, layer in packed_layers(rounded):
        unpack(layer)
    whole = memrt.load(config, seed=0)
    weights = [dict(model.named_parameters())[WEIGHT].detach() for model in (rounded, whole)]
    rounding = float((weights[0] - weights[1]).norm() / weights[1].norm())
    of_packed, of_rounded, of_whole = map(hidden_states, (packed, rounded, whole))
    for one, same, other in zip(of_packed, of_rounded, of_whole, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-6)
        error = float((one - other).norm() / other.norm())
        assert rounding / 10 < error < 3 * rounding  # some ten products one after another


def test_a_user_s_own_gradients_at_the_input_do_not_open_the_backbone() -> None:
    model = model_of("llama")
    ladder(model)
    embeddings = torch.randn(2, 5, 32, requires_grad=True)
    model(inputs_embeds=embeddings)["logits"].sum().backward()
    assert embeddings.grad is None


# ---------------------------------------------------------------- what is kept


@contextmanager
def saved(model: nn.Module) -> Iterator[list[Tensor]]:
    """What autograd saves in a session without stages, parameters and buffers left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            found.setdefault(key, tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
    kept += found.values()


TAPPED = {"linear": 5, "low_rank": 5, "pooled": 0}
"""Backbone states that are kept beside a model of four blocks: the embeddings' and the blocks'."""


WIDTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model", {"intermediate_size": 160}),
    "bert": ("bert", {"intermediate_size": 160}),
    "t5": ("", {"d_ff": 160}),
}
"""The body, and widths that are told apart: hidden 64, MLP 160, side 16 and 40, 24 tokens."""


@pytest.mark.parametrize("family", WIDTHS)
@pytest.mark.parametrize("taps", TAPPED)
def test_nothing_of_the_backbone_is_kept_but_the_taps(taps: str, family: str) -> None:
    """Of a decoder, an encoder, and both stacks of an encoder-decoder."""
    body, widths = WIDTHS[family]
    model = model_of(family, hidden=64, **widths)
    session = ladder(model, reduction=4, taps=taps)
    batch = batch_of(family, length=24)
    labels = {} if body else {"labels": batch["labels"]}
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with saved(model) as kept, session.micro_batch():
        result = model.get_submodule(body)(**given, **labels)
    num_bytes = [tensor.untyped_storage().nbytes() for tensor in kept]
    state, attention = 4 * 2 * 24 * 64, 4 * 2 * 4 * 24 * 24  # batch, heads, tokens, tokens
    assert num_bytes.count(state) == TAPPED[taps] * len(session.facts.structure.stacks)
    assert attention not in num_bytes
    assert 160 not in {size for tensor in kept for size in tensor.shape}
    logits_bytes = result["logits"].untyped_storage().nbytes() if labels else 0
    assert max(n for n in num_bytes if n != logits_bytes) <= max(state, 4 * 2 * 24 * 40)


def activation_bytes(family: str, strategies: list[str], **overrides: Any) -> int:
    model = model_of(family, **overrides)
    timeline = counted(model, strategies, [batch_of(family, length=64)])
    return timeline.account_maxima()[Account.ACTIVATIONS.value]


def test_the_ledger_shows_each_tap_s_bytes() -> None:
    """Against pooled taps, which keep nothing: five states of the backbone, whole or in 8 bits."""
    shape: dict[str, Any] = {"hidden": 64}
    tokens, states = 2 * 64, 5
    pooled, linear, float8 = (
        activation_bytes("llama", [f"ladder(reduction=4, {options})", "fused_loss"], **shape)
        for options in ("taps='pooled'", "taps='linear'", "taps='linear', kept='float8'")
    )
    assert linear - pooled == states * tokens * 64 * 4
    assert float8 - pooled == states * tokens * (64 + 2)


@pytest.mark.parametrize("family", ["llama", "bert", "plain"])
def test_nothing_depends_on_what_was_frozen_before(family: str) -> None:
    """Loss and gradients have the same bits, and the backbone has none of the latter."""
    found = []
    for trains in (True, False):
        model = model_of(family).requires_grad_(trains)
        side = ladder(model, taps="linear", head="frozen")
        torch.manual_seed(1)
        loss = side.train_micro_batch(lambda model=model: model_loss(model, batch_of(family)))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert gradients
        assert all("ladder" in name for name in gradients)
        found.append({**gradients, "loss": loss})
    assert_equal(*found)


def test_a_layer_keeps_what_the_paper_s_formula_says() -> None:
    """U = batch x tokens x hidden elements: a whole block keeps c, a rung 1 tap + (c + 2) / r."""
    shape: dict[str, Any] = {"hidden": 256, "intermediate_size": 688}
    unit, reduction = 4 * 2 * 64 * 256, 4

    def kept_by_a_layer(strategies: list[str]) -> float:
        few, many = (
            activation_bytes("llama", [*strategies, "fused_loss"], layers=n, **shape)
            for n in (3, 7)
        )
        return (many - few) / 4 / unit

    whole = kept_by_a_layer([])
    found = kept_by_a_layer([f"ladder(reduction={reduction}, taps='linear')"])
    assert found == pytest.approx(1 + (whole + 2) / reduction, rel=0.05)


def test_a_checkpointed_side_keeps_less_and_computes_the_same() -> None:
    plain, less = (f"ladder(reduction=2, taps='pooled', checkpoint={c})" for c in (False, True))
    shape: dict[str, Any] = {"hidden": 64, "layers": 8}
    assert activation_bytes("llama", [less], **shape) < activation_bytes("llama", [plain], **shape)
    model = model_of("llama")
    batch = batch_of("llama")
    one = one_pass(model, [plain], [batch])
    other = one_pass(model, [less], [batch])
    assert_equal(one.gradients, other.gradients)


def test_a_hidden_state_dies_when_its_rung_has_read_it() -> None:
    """With pooled taps no more of the backbone lives in a deep model than in a shallow one."""
    peaks = []
    for layers in (6, 12):
        model = model_of("llama", hidden=64, layers=layers)
        timeline = counted(
            model,
            ["ladder(reduction=4, taps='pooled', checkpoint=True)", "fused_loss(chunk_tokens=8)"],
            [batch_of("llama", length=64)],
        )
        forward = timeline.peak(where=lambda region: region.phase == "forward")
        peaks.append(forward.accounts["workspace"])
    assert peaks[0] == peaks[1]


# ---------------------------------------------------------------- gates, joins, rungs


def test_a_closed_gate_shuts_the_backbone_out_and_an_open_one_lets_only_it_in() -> None:
    model = model_of("llama").eval()
    ladder(model, start="lst")
    batch = batch_of("llama")
    gates = [m.gate.parameter for m in model.modules() if hasattr(m, "gate") and m.gate is not None]
    assert len(gates) == 4
    seen: dict[str, Tensor] = {}

    def after(index: int, value: float, change: float) -> Tensor:
        """The side's last state, with a given gate and a changed output of one block."""
        for gate in gates:
            gate.data.fill_(value)
        block = model.model.layers[index]
        hook = block.mlp.register_forward_hook(lambda _m, _i, out: out + change)
        side = model.model.layers[3].ladder.block
        other = side.register_forward_hook(lambda _m, _i, out: seen.update(state=out))
        logits(model, batch)
        hook.remove()
        other.remove()
        return seen["state"]

    for index in range(4):
        assert torch.equal(after(index, 1e6, 0.0), after(index, 1e6, 1.0))
    assert not torch.equal(after(3, -1e6, 0.0), after(3, -1e6, 1.0))
    stem = model.model.layers[0].ladder.stem
    expected = after(3, -1e6, 0.0)
    stem.bias.data.add_(5.0)  # the side's own state plays no part
    assert torch.equal(after(3, -1e6, 0.0), expected)


def test_an_unreduced_ladder_with_open_gates_is_the_backbone() -> None:
    for family, name in (("llama", "model.norm"), ("gpt2", "transformer.ln_f")):
        model = model_of(family, hidden=64).eval()
        ladder(model, reduction=1, taps="pooled", start="lst")
        for module in model.modules():
            if getattr(module, "gate", None) is not None:
                module.gate.parameter.data.fill_(1e6)
        norm = model.get_submodule(name)
        assert isinstance(norm.ladder.norm, nn.Module)
        seen: dict[str, Tensor] = {}
        norm.ladder.norm.register_forward_hook(recorder(seen, "side"))
        norm.ladder.register_forward_pre_hook(recorder(seen, "backbone"))
        logits(model, batch_of(family))
        torch.testing.assert_close(seen["side"], seen["backbone"])


def recorder(seen: dict[str, Tensor], key: str) -> Any:
    """A hook, before or after a forward, that keeps the last thing it is given."""

    def hook(_: nn.Module, *values: Any) -> None:
        seen[key] = values[-1][0] if isinstance(values[-1], tuple) else values[-1]

    return hook


def test_qst_s_join_with_its_mixture_open_is_the_backbone() -> None:
    model = model_of("llama").eval()
    expected = logits(model, batch_of("llama"))
    ladder(model, start="qst", gate="vector", taps="low_rank")
    join = model.model.norm.ladder
    join.mixture.data.fill_(1e6)
    join.up.weight.data.zero_()
    assert torch.equal(logits(model, batch_of("llama")), expected)


@pytest.mark.parametrize("open_gate", [False, True])
def test_lst_s_merged_join_is_the_backbone_or_the_side_at_its_ends(open_gate: bool) -> None:
    """merge_last of the authors' code: g up(S) + (1 - g) H, at first in halves."""
    batch = batch_of("llama")
    model, alone = model_of("llama").eval(), model_of("llama").eval()
    expected = logits(model, batch)
    ladder(model, start="lst_merged")
    gate = model.model.norm.ladder.gate
    assert float(gate().detach()) == 0.5
    assert gate.parameter.dtype == torch.float32
    assert not torch.equal(logits(model, batch), expected)
    if open_gate:
        ladder(alone, start="lst")
        expected = logits(alone, batch)
    gate.parameter.data.fill_(1e6 if open_gate else -1e6)
    assert torch.equal(logits(model, batch), expected)


def test_qst_s_join_has_a_bias_and_starts_as_a_linear_layer_does() -> None:
    """As in the authors' code; the others have one too, of zeros."""
    for form in ("qst", "lst", "lst_merged", "exact"):
        model = model_of("llama").eval()
        ladder(model, start=form)
        up = model.model.norm.ladder.up.requires_grad_(False)
        assert up.bias.shape == (up.out_features,)
        assert bool(up.bias.any()) is (form == "qst")
        if form == "qst":
            bound = up.in_features**-0.5
            assert float(up.bias.abs().max()) <= bound
            assert 0.9 * bound < float(up.weight.abs().max()) <= bound


@pytest.mark.parametrize(
    ("options", "rungs"), [({"every": 2}, [1, 3]), ({"layers": (0, 2)}, [0, 2])]
)
def test_rungs_hang_where_they_are_asked(options: dict[str, Any], rungs: list[int]) -> None:
    model = model_of("llama")
    session = ladder(model, **options)
    found = [i for i, layer in enumerate(model.model.layers) if layer.ladder.block is not None]
    assert found == rungs
    losses = [float(step(session, batch_of("llama", seed=0))) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("width", "layers", "heads", "mlp", "head_width", "kept", "share"),
    [
        (768, 12, 12, 3072, 64, (1, 2, 3, 5, 6, 7, 9, 10, 11), 1.74),  # T5-base, as published
        (1024, 24, 16, 4096, 64, tuple(range(1, 24, 2)), 1.23),  # T5-large
        (1024, 24, 32, 16384, 128, (23,), 0.087),  # T5-3B
    ],
)
def test_parameter_counts_are_those_of_lst(
    width: int,
    layers: int,
    heads: int,
    mlp: int,
    head_width: int,
    kept: tuple[int, ...],
    share: float,
) -> None:
    """Percent of the model, with LST's own tables of position biases beside."""
    transformers = pytest.importorskip("transformers")
    from memrt.profiling.fake import fake_tensors

    config = transformers.T5Config(
        d_model=width,
        d_kv=head_width,
        d_ff=mlp,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
    )
    with fake_tensors():
        model = transformers.T5ForConditionalGeneration(config)
        ladder(model, reduction=8, layers=kept, start="lst", init="random")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tables = 2 * 32 * heads  # here the backbone's own biases of the kept heads serve
    backbone = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    digits = 3 if share < 1 else 2
    assert round(100 * (count + tables) / backbone, digits) == share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_fp32_whatever_the_side_network_is(dtype: torch.dtype) -> None:
    model = model_of("llama").to(dtype)
    session = memrt.prepare(model, ["ladder(reduction=2)"], lr=1e-3)
    side = dict(model.named_parameters())["model.layers.0.ladder.tap.weight"]
    assert side.dtype is dtype
    for seed in range(2):
        session.train_micro_batch(lambda seed=seed: model(**batch_of("llama", seed=seed))["loss"])
        session.step()
    assert session.optimizer is not None
    moments = [v for k, v in session.optimizer.state[side].items() if k.startswith("exp_avg")]
    assert [moment.dtype for moment in moments] == [torch.float32] * 2


# ---------------------------------------------------------------- starting weights


def test_starting_weights_are_sub_matrices_along_one_set_of_channels() -> None:
    model = model_of("llama", hidden=64, intermediate_size=128)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ladder(model, reduction=2)
    layers = model.model.layers
    channels = layers[0].ladder.tap.weight.argmax(dim=1)
    assert torch.equal(channels, expected_channels(weights, 32))
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}"
        side = layer.ladder.block
        assert torch.equal(layer.ladder.tap.weight.argmax(dim=1), channels)
        up = weights[f"{prefix}.mlp.up_proj.weight"][:, channels]
        neurons = [int((up == row).all(dim=1).nonzero()) for row in side.mlp.up_proj.weight]
        assert neurons == sorted(neurons)
        gate, down = (weights[f"{prefix}.mlp.{n}_proj.weight"] for n in ("gate", "down"))
        assert torch.equal(side.mlp.gate_proj.weight, gate[neurons][:, channels])
        assert torch.equal(side.mlp.down_proj.weight, down[channels][:, neurons])
        query = weights[f"{prefix}.self_attn.q_proj.weight"][:, channels]
        rows = [int((query == row).all(dim=1).nonzero()) for row in side.self_attn.q_proj.weight]
        heads = [rows[i : i + 16] for i in range(0, len(rows), 16)]
        assert all(head == list(range(head[0], head[0] + 16)) for head in heads)
        assert all(head[0] % 16 == 0 for head in heads)
        output = weights[f"{prefix}.self_attn.o_proj.weight"]
        assert torch.equal(side.self_attn.o_proj.weight, output[channels][:, rows])


def test_heads_that_are_kept_are_the_best_of_the_best_group() -> None:
    """Brute force, with 8 query heads for each of two key heads, of which 4 of one group stay."""
    model = model_of(
        "llama",
        hidden=256,
        intermediate_size=64,
        num_attention_heads=16,
        num_key_value_heads=2,
    )
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ladder(model, reduction=4)

    def by_head(name: str, axis: int) -> Tensor:
        norms = weights[name].abs().sum(dim=1 - axis)
        return (norms / norms.sum()).view(-1, 16).sum(dim=1)

    chosen = set()
    for index, layer in enumerate(model.model.layers):
        prefix, side = f"model.layers.{index}.self_attn", layer.ladder.block.self_attn
        channels = layer.ladder.tap.weight.argmax(dim=1)
        query = by_head(f"{prefix}.q_proj.weight", 0) + by_head(f"{prefix}.o_proj.weight", 1)
        key = by_head(f"{prefix}.k_proj.weight", 0) + by_head(f"{prefix}.v_proj.weight", 0)
        best = int((key + query.view(2, 8).sum(dim=1)).argmax())
        inside = query.view(2, 8)[best].argsort(descending=True)[:4].sort().values
        heads = [8 * best + int(head) for head in inside]
        rows = torch.cat([torch.arange(16 * head, 16 * head + 16) for head in heads])
        keys = torch.arange(16 * best, 16 * best + 16)
        for name, kept in (("q", rows), ("k", keys), ("v", keys)):
            expected = weights[f"{prefix}.{name}_proj.weight"][kept][:, channels]
            assert torch.equal(side.get_submodule(f"{name}_proj").weight, expected), name
        output = weights[f"{prefix}.o_proj.weight"]
        assert torch.equal(side.o_proj.weight, output[channels][:, rows])
        chosen.add(tuple(heads))
    assert len(chosen) > 1  # layer by layer


def test_side_heads_are_even_and_16_wide_or_more() -> None:
    """Whatever divides: as wide as the backbone's where those fit, fewer in place of narrower."""
    found = 0
    for hidden, heads, kv_heads in itertools.product(
        (256, 384, 768, 896, 1152, 4096, 5120, 8192), (4, 6, 8, 12, 14, 16, 32, 64), (1, 2, 4, 8)
    ):
        if hidden % heads or hidden // heads % 2 or heads % kv_heads:
            continue
        wide = Widths(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=hidden // heads)
        for reduction in (2, 3, 4, 8, 16):
            try:
                side = wide.narrowed(reduction, own_head_dim=False)
            except ValueError as refused:
                assert f"reduction={reduction}" in str(refused)  # noqa: PT017
                continue
            found += 1
            assert side.head_dim % 2 == 0
            assert side.head_dim >= 16
            assert side.heads * side.head_dim == side.hidden == hidden // reduction
            assert side.heads % side.kv_heads == 0
            assert side.heads // side.kv_heads <= heads // kv_heads
            if wide.head_dim >= 16 and side.hidden % wide.head_dim == 0:
                assert side.head_dim == wide.head_dim
    assert found > 200


def test_pooled_taps_have_weights_that_were_made_for_them() -> None:
    """What the side reads and writes is what the tap gives: the same sums of channels."""
    model = model_of("llama", hidden=64, intermediate_size=128)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ladder(model, reduction=2, taps="pooled")
    pool = torch.eye(32).repeat_interleave(2, dim=0) * 2**-0.5  # [64, 32]
    hidden = torch.randn(3, 5, 64)
    for index, layer in enumerate(model.model.layers):
        side, prefix = layer.ladder.block, f"model.layers.{index}"
        torch.testing.assert_close(layer.ladder.tap(hidden), hidden @ pool)
        up, down = (weights[f"{prefix}.mlp.{n}_proj.weight"] for n in ("up", "down"))
        distances = torch.cdist(side.mlp.up_proj.weight.detach(), up @ pool)
        kept = distances.argmin(dim=1)
        assert len(set(kept.tolist())) == len(kept)
        torch.testing.assert_close(side.mlp.up_proj.weight.detach(), (up @ pool)[kept])
        torch.testing.assert_close(
            side.mlp.down_proj.weight.detach(), pool.t() @ down[:, kept], atol=1e-7, rtol=1e-5
        )


def expected_channels(weights: dict[str, Tensor], count: int) -> Tensor:
    """Brute force: the L1 norms of rows and columns, each weight's with a sum of one."""
    total = torch.zeros(64)
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim == 2:
            axis = 0 if "o_proj" in name or "down_proj" in name else 1
            norms = weight.abs().sum(dim=1 - axis)
            total += norms / norms.sum()
    return total.argsort(descending=True)[:count].sort().values


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_depend_on_the_seed_alone(family: str) -> None:
    found = []
    for global_seed, seed in ((0, 1), (5, 1), (0, 2)):
        model = model_of(family)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        ladder(model, init="random", seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append({n: p.detach() for n, p in model.named_parameters() if CHILD in n})
    assert_equal(found[0], found[1])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


# ---------------------------------------------------------------- heads, outputs


def test_a_task_head_trains_and_a_language_model_s_does_not() -> None:
    transformers = pytest.importorskip("transformers")
    from memrt.testing import tiny_config

    torch.manual_seed(0)
    config = tiny_config("bert", num_labels=2)
    model = transformers.BertForSequenceClassification(config)
    session = ladder(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad} - side_names(model)
    pooler = {f"bert.pooler.dense.{part}" for part in ("weight", "bias")}
    assert trained == {"classifier.weight", "classifier.bias"} | pooler
    batch = {**batch_of("bert"), "labels": torch.tensor([0, 1])}
    losses = [float(step(session, batch)) for _ in range(8)]
    assert losses[-1] < losses[0]
    session.detach()
    ladder(model, head="frozen")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == side_names(model)


def test_outputs_of_the_model_are_its_own() -> None:
    model = model_of("llama").eval()
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    plain = model(**batch_of("llama"), **options)
    ladder(model)
    ours = model(**batch_of("llama"), **options)
    assert len(ours.hidden_states) == len(plain.hidden_states) == 5
    assert len(ours.attentions) == 4
    for one, other in zip(ours.hidden_states[:-1], plain.hidden_states[:-1], strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- what it refuses, the plan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 3}, "reduction=3 does not divide the model's hidden size of 32"),
        ({"reduction": 4}, "make no heads of an even width of 16"),
        ({"layers": (1, 4)}, "there is no 4; the last is 3"),
        ({"every": 5}, "every=5 is more than the 4 blocks"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused(settings: dict[str, Any], message: str) -> None:
    model = model_of("llama")
    with pytest.raises(ConflictError, match=message):
        ladder(model, **settings)
    assert not side_names(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 0}, "reduction=0"),
        ({"taps": "wide"}, "taps='wide': use one of linear"),
        ({"layers": (1, 1)}, "twice"),
        ({"layers": (-1,)}, "from 0"),
        ({"layers": (1,), "every": 2}, "one of the two"),
        ({"taps": "pooled", "kept": "float8"}, "keep nothing"),
        ({"checkpoint": 1}, "True or False"),
        ({"layers": 3}, "layers=3: must be a list"),
        ({"layers": "02"}, "layers='02': must be a list"),
        ({"seed": "a"}, "seed='a': must be a whole number"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ladder(nn.Linear(2, 2), **settings)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConflictError, match="no list of repeated blocks"):
        ladder(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_a_forward_that_was_replaced_and_biases_by_head_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = model_of("llama")
    block = model.model.layers[1]
    block.forward = block.forward
    with pytest.raises(ConflictError, match=r"model\.layers\.1 was replaced on this instance"):
        ladder(model)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(ConflictError, match="position bias for each of their heads"):
        ladder(bloom)


def test_blocks_that_cannot_be_made_narrower_are_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).view(-1, 2, 32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

    model = Model()
    with pytest.raises(ValueError, match="a narrower copy of the block Block cannot be made"):
        ladder(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not side_names(model)


# ---------------------------------------------------------------- blocks that run out of turn


class Blocks(nn.Module):
    """Runs its blocks, by their numbers, in the order that it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)
        )
        self.head = nn.Linear(32, 4)
        self.order = [0, 1, 2]
        self.fails_after: int | None = None

    def body(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = x + self.layers[index](x)
            if index == self.fails_after:
                raise RuntimeError("out of memory")
        return x

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(x))
        return result


def side_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2, 0, 1, 2], "block 0 of layers ran on what the ladder"),
        ([0, 0, 1, 1, 2, 2], "block 1 of layers ran after block 1,"),
        ([2, 1, 0], "block 2 of layers ran after none,"),
        ([0, 2, 1], "block 1 of layers ran after none,"),
    ],
    ids=str,
)
def test_blocks_that_run_twice_or_out_of_order_are_refused(order: list[int], message: str) -> None:
    model, x = Blocks(), torch.randn(2, 5, 32)
    ladder(model, init="random")
    expected = side_gradients(model, model(x).sum())
    assert expected
    model.order = order
    with pytest.raises(ValueError, match=message):
        model(x)
    model.order = [0, 1, 2]
    assert_equal(side_gradients(model, model(x).sum()), expected)


def test_a_model_that_takes_its_own_joined_output_is_refused_where_it_learns() -> None:
    """Somebody else's gradients, and evaluation without any, may come to the blocks."""
    model, x = Blocks(), torch.randn(2, 5, 32)
    ladder(model, init="random")
    with pytest.raises(ValueError, match="block 0 of layers ran on what the ladder"):
        model.body(torch.tanh(model.body(x)))
    with torch.no_grad():
        model.body(model.body(x))
    own = nn.Linear(32, 32)
    assert side_gradients(model, model(own(x)).sum())


def test_two_inputs_after_one_another_have_the_gradients_of_both() -> None:
    model, x, y = Blocks(), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    ladder(model, init="random")
    first, second = (side_gradients(model, model(each).sum()) for each in (x, y))
    both = side_gradients(model, model(x).sum() + model(y).sum())
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, first[name] + second[name])


@pytest.mark.parametrize("stopped", [0, 1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_was_interrupted_leaves_nothing_behind(stopped: int, training: bool) -> None:
    model, x = Blocks(), torch.randn(2, 5, 32)
    ladder(model.train(training), init="random")
    expected = side_gradients(model, model(x).sum())
    model.fails_after = stopped
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x)
    model.fails_after = None
    assert_equal(side_gradients(model, model(x).sum()), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_all_blocks_together_may_be_recomputed(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = Blocks(), torch.randn(2, 5, 32, requires_grad=True)
    ladder(model, init="random")
    expected = side_gradients(model, model(x).sum())
    for _ in range(2):
        output = checkpoint(model, x, use_reentrant=reentrant)
        assert_equal(side_gradients(model, output.sum()), expected)


@pytest.mark.parametrize("order", [[0, 2], [0, 1]], ids=str)
def test_blocks_may_be_skipped(order: list[int]) -> None:
    model, x = Blocks(), torch.randn(2, 5, 32)
    ladder(model, init="random")
    expected = side_gradients(model, model(x).sum())
    model.order = order
    assert model(x).shape == (2, 5, 4)
    model.order = [0, 1, 2]
    assert_equal(side_gradients(model, model(x).sum()), expected)


def test_a_list_that_has_one_block_several_times_is_refused() -> None:
    model = Blocks()
    model.layers = nn.ModuleList([model.layers[0]] * 3)
    with pytest.raises(ConflictError, match="Blocks runs its 1 blocks of layers 3 times a forward"):
        ladder(model, init="random")
    assert not side_names(model)


@pytest.mark.parametrize("other", ["activation_checkpoint", "lisa(layers=1)", "badam"])
def test_who_recomputes_or_trains_the_backbone_is_refused_by_name(other: str) -> None:
    with pytest.raises(
        ConflictError, match=f"ladder.*{other.partition('(')[0]}|{other.partition('(')[0]}.*ladder"
    ):
        memrt.prepare(model_of("llama"), [NARROW, other])


def test_70b_is_planned_from_a_few_layers() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    side = "ladder(reduction=16, taps='pooled', checkpoint=True)"
    found = plan(
        config,
        ["nf4", side, "int8_states", "fused_loss"],
        sequence_length=2048,
        dtype=torch.bfloat16,
    )
    assert found.simulated_layers == (4, 5, 6)
    accounts = found.simulation.peak.accounts
    assert accounts["weights"] + accounts["gradients"] + accounts["optimizer"] < 40 * 2**30
    assert found.peak_bytes < 48 * 2**30
    # what the side's blocks were given, and the gates' differences: an eighth of the backbone's
    states = 80 * 2048 * 8192 * 2
    assert accounts["activations"] < states / 6


def test_extrapolated_layers_equal_the_full_run() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        use_cache=False,
    )
    stack = ["ladder(reduction=4)", "fused_loss(chunk_tokens=8)", "int8_states"]
    quick = plan(config, stack, batch_size=2, sequence_length=16)
    whole = plan(config, stack, batch_size=2, sequence_length=16, full=True)
    assert quick.simulated_layers == (4, 5, 6)
    assert quick.simulation.peak.accounts == whole.simulation.peak.accounts
    assert quick.simulation.account_maxima == whole.simulation.account_maxima


def test_a_plan_repeats_layers_where_nothing_has_imported_peft_before(tmp_path: Path) -> None:
    # the import makes tensors, which the shallowest of the three simulations alone would count
    script = (
        "import sys, memrt; from memrt.testing import tiny_config; "
        "planned = memrt.plan(tiny_config('llama', layers=8), "
        "['ladder(reduction=2, checkpoint=True)'], sequence_length=8); "
        "assert len(planned.simulated_layers) == 3, planned.simulated_layers; "
        "assert 'peft' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
