"""A ladder whose first weights are the backbone's in the directions of its hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memrt
from memrt import registry
from memrt.errors import ConflictError
from memrt.ladder.attach import CHILD
from memrt.ladder.narrowing import Projection, Selection
from memrt.ladder.principal import pooled_directions, principal_directions
from memrt.planning import plan
from memrt.profiling.ledger import Ledger
from memrt.runner import copied, start, train_step
from memrt.session import Session
from memrt.structure import RunSettings
from memrt.testing import tiny_batches, tiny_config, tiny_model
from tests.strategies.runs import assert_equal
from tests.trainer_runs import examples, trainer_of

PRINCIPAL = "ladder(reduction=2, init='principal', probe_batches=2)"
FAMILIES = ["llama", "gpt2", "bert", "t5", "gemma2", "plain"]


def source(family: str) -> Callable[[int], Iterator[dict[str, Tensor]]]:
    return lambda count: iter(tiny_batches(family, count=count, seed=7))


def directions(
    model: nn.Module, family: str, *, side: int, find: Any = principal_directions
) -> Projection:
    run = Session(model, [], probe_batches=source(family))
    stacks = [stack.layers for stack in run.facts.structure.stacks]
    found: Projection = find(run, stacks, side=side, count=2)
    return found


# ---------------------------------------------------------------- the directions


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_they_are_the_leading_eigenvectors_of_all_hidden_states(family: str) -> None:
    """Of every token that is no padding, at length 1; in evaluation mode, the RNG left alone."""
    torch.manual_seed(0)
    model = tiny_model(family).train()
    before = torch.get_rng_state()
    found = directions(model, family, side=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    seen: list[Tensor] = []
    (stack,) = Session(model, []).facts.structure.stacks
    stack.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for layer in stack.layers:
        layer.register_forward_hook(
            lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    model.eval()
    states: list[Tensor] = []
    for batch in source(family)(2):
        with torch.no_grad():
            model(**batch)
        assert len(seen) == len(stack.layers) + 1
        states += [hidden[batch["attention_mask"].bool()] for hidden in seen]
        seen.clear()
    x = torch.nn.functional.normalize(torch.cat(states).double(), dim=1)
    values, vectors = torch.linalg.eigh(x.t() @ x)
    wanted = vectors[:, -16:].flip(1)
    alike = (wanted * found.basis).sum(dim=0).abs()
    assert (alike - 1).abs().max() < 1e-3  # the gap between neighbours is a hundredth
    assert found.energy.item() == pytest.approx(float(values[-16:].sum() / values.sum()), abs=1e-5)
    projected = (x @ found.basis.double()).square().sum(dim=1).mean()
    assert projected.item() == pytest.approx(found.energy.item(), abs=1e-5)


def test_of_several_bases_it_is_the_best_for_its_width() -> None:
    torch.manual_seed(0)
    model: Any = tiny_model("llama")
    found = directions(model, "llama", side=8)
    drawn = torch.linalg.qr(torch.randn(32, 8)).Q
    states = []
    model.model.layers[1].register_forward_hook(lambda _, args, out: states.append(out))
    with torch.no_grad():
        for batch in source("llama")(2):
            model.eval()(**batch)
    x = torch.cat([state.reshape(-1, 32) for state in states])
    assert (x @ found.basis).norm() > 1.2 * (x @ drawn).norm()


def test_of_sums_of_channels_the_least_squares_guess_the_rest() -> None:
    """Of every token and layer, as `torch.linalg.lstsq` does in fp64; sums alone say less."""
    torch.manual_seed(0)
    model: Any = tiny_model("llama").eval()
    mixing = torch.randn(32, 32) * torch.linspace(2, 0.05, 32)  # some directions hold more
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ mixing.t())
    found = directions(model, "llama", side=16, find=pooled_directions)
    pool = torch.eye(16).repeat_interleave(2, dim=0) * 2**-0.5
    assert torch.equal(found.basis, pool)
    states: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: states.append(out))
    with torch.no_grad():
        for batch in source("llama")(2):
            model(**batch)
            keep = batch["attention_mask"].bool()
            states[:] = [state[keep] if state.ndim == 3 else state for state in states]
    x = torch.nn.functional.normalize(torch.cat(states).double(), dim=1)
    sums = x @ pool.double()
    assert found.energy.item() == pytest.approx(float(sums.square().sum(dim=1).mean()), abs=1e-5)

    def left(reading: Tensor) -> float:
        return float((x - sums @ reading.double().t()).square().sum(dim=1).mean())

    best = left(torch.linalg.lstsq(sums, x).solution.t())
    assert left(found.reading) <= 1.02 * best  # the ridge
    assert left(found.reading) < 0.8 * left(pool)


# ---------------------------------------------------------------- the weights


def test_pooled_taps_read_by_the_guess_and_write_sums() -> None:
    model: Any = tiny_model("llama", hidden=64)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = directions(model, "llama", side=32, find=pooled_directions)
    spec = PRINCIPAL.replace("(", "(taps='pooled', ", 1)
    memrt.prepare(model, [spec], probe_batches=source("llama"))
    for index, layer in enumerate(model.model.layers):
        side, prefix = layer.ladder.block.mlp, f"model.layers.{index}.mlp"
        up, down = (weights[f"{prefix}.{n}_proj.weight"] for n in ("up", "down"))
        read = up @ found.reading
        kept = torch.cdist(side.up_proj.weight.detach(), read).argmin(dim=1)
        assert len(set(kept.tolist())) == len(kept)
        torch.testing.assert_close(side.up_proj.weight.detach(), read[kept])
        torch.testing.assert_close(side.down_proj.weight.detach(), found.basis.t() @ down[:, kept])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_in_all_directions_a_side_block_is_the_backbone_s_in_another_basis(family: str) -> None:
    """RMSNorm with equal weights commutes with rotations, so block(Uᵀ H) = Uᵀ block(H)."""
    torch.manual_seed(0)
    model: Any = tiny_model(family, hidden=64).eval()  # heads of 16
    batch = tiny_batches(family, count=1)[0]
    found: list[tuple[Tensor, Tensor]] = []
    wanted: list[tuple[Tensor, Tensor]] = []

    def keep(into: list[tuple[Tensor, Tensor]]) -> Any:
        return lambda _, args, out: into.append(
            (args[0], out[0] if isinstance(out, tuple) else out)
        )

    hooks = [layer.register_forward_hook(keep(wanted)) for layer in model.model.layers]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    spec = PRINCIPAL.replace("reduction=2", "reduction=1")
    run = memrt.prepare(model, [spec], probe_batches=source(family))
    layers = model.model.layers
    basis = layers[0].ladder.stem.weight.t()
    assert (basis.t() @ basis - torch.eye(64)).abs().max() < 1e-5
    with torch.no_grad():
        for layer in layers:
            layer.ladder.gate.parameter.fill_(1e4)  # the state alone goes on
            layer.ladder.block.register_forward_hook(keep(found))
        model(**batch)
    run.detach()
    assert len(found) == len(wanted)
    for (ours, made), (theirs, output) in zip(found, wanted, strict=True):
        assert (ours - theirs @ basis).abs().max() <= 2e-5 * theirs.abs().max()
        assert (made - output @ basis).abs().max() <= 2e-5 * output.abs().max()


def test_norms_keep_a_weight_s_mean_and_the_length_of_what_is_left() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 16)).Q
    narrowing = Projection(basis=basis, energy=torch.tensor(0.75), reading=basis)
    norm = nn.LayerNorm(64)
    nn.init.normal_(norm.weight, 1.0, 0.1)
    nn.init.normal_(norm.bias)
    gain = (0.75 * 64 / 16) ** 0.5
    expected = gain * torch.einsum("hs,h,hs->s", basis, norm.weight.detach(), basis)
    assert torch.allclose(narrowing.of_norm(norm, "weight"), expected, atol=1e-6)
    assert torch.allclose(narrowing.of_norm(norm, "bias"), norm.bias.detach() @ basis)
    channels = torch.tensor([3, 5])
    assert torch.equal(Selection(channels).of_norm(norm, "weight"), norm.weight.detach()[channels])
    weight = torch.randn(5, 64)
    assert torch.equal(
        Selection(channels).along(weight, 1), weight @ Selection(channels).matrix(64)
    )


@pytest.mark.parametrize(
    ("family", "taps"),
    [
        *((family, taps) for family in FAMILIES for taps in ("linear", "projected")),
        ("llama", "low_rank"),
        ("bert", "pooled"),
        ("t5", "pooled"),
    ],
)
def test_it_starts_as_the_backbone_to_the_bit_trains_and_leaves_it_so(
    family: str, taps: str
) -> None:
    torch.manual_seed(0)
    model = tiny_model(family).eval()
    batch = tiny_batches(family, count=1)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**batch)["logits"]
    spec = PRINCIPAL.replace("(", f"(taps='{taps}', ", 1)
    run = memrt.prepare(model.train(), [spec], lr=1e-2, probe_batches=source(family))
    with torch.no_grad():
        assert torch.equal(model(**batch)["logits"], expected)
    for _ in range(2):
        run.train_micro_batch(lambda: model(**batch)["loss"])
        run.step()
    with torch.no_grad():
        assert not torch.equal(model(**batch)["logits"], expected)
    run.detach()
    assert_equal(dict(model.state_dict()), before)


def test_a_packed_backbone_gives_what_its_dense_weights_give() -> None:
    model: Any = memrt.load(tiny_config("llama", hidden=64), ["nf4"], seed=0)
    memrt.prepare(model, ["nf4", PRINCIPAL], probe_batches=source("llama"))
    layer = model.model.layers[0]
    projection = layer.self_attn.o_proj
    basis = layer.ladder.stem.weight.t()
    dense = projection.dense(projection.weight)
    wanted = basis.t() @ dense
    made = layer.ladder.block.self_attn.o_proj.weight
    assert any(torch.allclose(made, wanted[:, s : s + made.shape[1]], atol=1e-6) for s in range(64))


# ---------------------------------------------------------------- projected taps


def test_projected_taps_are_the_directions_and_keep_nothing() -> None:
    torch.manual_seed(0)
    model: Any = tiny_model("llama")
    spec = PRINCIPAL.replace("(", "(taps='projected', ", 1)
    memrt.prepare(model, [spec], probe_batches=source("llama"))
    layers = model.model.layers
    taps = [layers[0].ladder.stem, *(layer.ladder.tap for layer in layers)]
    assert not [p for tap in taps for p in tap.parameters()]
    assert [name for name, _ in model.named_buffers() if "basis" in name] == [
        "model.layers.0.ladder.stem.basis"  # once for all layers
    ]
    hidden = torch.randn(2, 3, 32, requires_grad=True)
    for tap in taps:
        assert not tap(hidden).requires_grad
        assert torch.equal(tap(hidden), hidden.detach() @ taps[0].basis)
    moved = copy.deepcopy(model).double().model.layers
    assert moved[1].ladder.tap(hidden.double()).dtype == torch.float64
    moved[0].ladder.stem.basis.zero_()
    assert not moved[1].ladder.tap(hidden.double()).any()  # the copy's, not the first model's


def test_they_select_where_the_side_is_cut_out_and_are_drawn_where_it_is_random() -> None:
    torch.manual_seed(0)
    model: Any = tiny_model("llama")
    run = memrt.prepare(model, ["ladder(reduction=2, taps='projected')"])
    basis = model.model.layers[0].ladder.stem.basis
    assert torch.equal(basis.sum(dim=0), torch.ones(16))
    assert torch.equal(basis.square(), basis)
    run.detach()
    memrt.prepare(model, ["ladder(reduction=2, taps='projected', init='random')"])
    basis = model.model.layers[0].ladder.stem.basis
    assert (basis.t() @ basis - torch.eye(16)).abs().max() < 1e-5


def test_a_saved_side_network_needs_no_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama").eval()
    batch = tiny_batches("llama", count=1)[0]
    spec = PRINCIPAL.replace("(", "(taps='projected', ", 1)
    run = memrt.prepare(model, [spec], lr=1e-2, probe_batches=source("llama"))
    run.train_micro_batch(lambda: model(**batch)["loss"])
    run.step()
    memrt.save_ladder(run, tmp_path / "side")
    with torch.no_grad():
        expected = model(**batch)["logits"]
    run.detach()
    again = memrt.load_ladder(model, tmp_path / "side")
    with torch.no_grad():
        assert torch.equal(model(**batch)["logits"], expected)
    again.detach()


# ---------------------------------------------------------------- plan, Trainer, refusals


@pytest.mark.parametrize("init", ["principal", "fisher", "principal', taps='pooled"])
def test_a_plan_is_the_ledger_of_the_run_its_look_at_data_included(init: str) -> None:
    strategies = [PRINCIPAL.replace("principal", init)]
    config = tiny_config("llama", layers=7)
    shape = {"batch_size": 2, "sequence_length": 16}
    planned = plan(config, strategies, **shape)
    parsed = registry.parse_all(strategies)
    model = memrt.load(config, parsed, dtype=torch.float32, seed=0)
    batch = dict(tiny_batches("llama", count=1)[0])
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    windows = [copied([batch]) for _ in range(2)]
    with Ledger() as ledger:
        run = start(
            model,
            parsed,
            settings=RunSettings(max_grad_norm=1.0),
            ledger=ledger,
            probe=windows[-1][0],
        )
        while windows:
            train_step(run, windows.pop())
        ledger.close()
    assert planned.peak_bytes == ledger.timeline.peak().peak_bytes
    assert planned.simulation.account_maxima == ledger.timeline.account_maxima()


@pytest.mark.parametrize("init", ["principal", "fisher"])
def test_looking_at_data_counts_packed_weights_from_the_start(init: str) -> None:
    strategies = ["nf4", PRINCIPAL.replace("principal", init)]
    config = tiny_config("llama", layers=7)
    planned = plan(config, strategies, batch_size=2, sequence_length=16)
    packed = memrt.load(config, ["nf4"], dtype=torch.float32, seed=0)
    tensors = {t.untyped_storage().data_ptr(): t for t in packed.state_dict().values()}
    weights = sum(t.untyped_storage().nbytes() for t in tensors.values())
    assert planned.simulation.to_json()["phases"]["probe"] > weights


def test_without_data_it_is_refused_and_the_model_is_left_alone() -> None:
    model = tiny_model("llama").train()
    with pytest.raises(ValueError, match=r"init='principal'.*probe_dataset.*init='magnitude'"):
        memrt.prepare(model, [PRINCIPAL])
    assert not [name for name, _ in model.named_parameters() if CHILD in name.split(".")]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_hidden_states_that_are_not_finite_are_refused() -> None:
    model: Any = tiny_model("llama").train()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="hidden states of the probe set are not finite"):
        memrt.prepare(model, [PRINCIPAL], probe_batches=source("llama"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_probe_set_of_padding_alone_is_refused() -> None:
    def hidden_away(count: int) -> list[dict[str, Tensor]]:
        batches = tiny_batches("bert", count=count)
        masks = [torch.zeros_like(batch["attention_mask"]) for batch in batches]
        return [
            {**batch, "attention_mask": mask} for batch, mask in zip(batches, masks, strict=True)
        ]

    with pytest.raises(ValueError, match="no position of the probe set counts"):
        memrt.prepare(tiny_model("bert"), [PRINCIPAL], probe_batches=hidden_away)


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="taps='projected' keep nothing"):
        memrt.prepare(nn.Linear(2, 2), ["ladder(taps='projected', kept='float8')"])
    with pytest.raises(ConflictError, match=r"use ladder\(init='random'\)"):
        memrt.prepare(tiny_model("mixtral"), [PRINCIPAL], probe_batches=source("mixtral"))


@pytest.mark.parametrize("init", ["principal", "fisher"])
def test_the_trainer_s_probe_set_is_what_it_looks_at(init: str, tmp_path: Path) -> None:
    """A probe set of one row again and again says what that row does."""
    spec = PRINCIPAL.replace("principal", init).replace("2)", "1)")
    rows = examples("llama", count=4)
    found = []
    for probe in (rows[:1] * 8, rows[:1] * 8, rows[1:2] * 8):
        options = {"strategies": [spec], "probe_dataset": probe}
        trainer = trainer_of(tmp_path, options=options)
        found.append(
            {n: p.detach().clone() for n, p in trainer.model.named_parameters() if CHILD in n}
        )
    assert_equal(found[0], found[1])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])
    with pytest.raises(ValueError, match=rf"init='{init}'.*probe_dataset"):
        trainer_of(tmp_path, options={"strategies": [spec]})
