"""GaLore through a session: AdamW in a subspace, and no projected weight's gradient is formed."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memrt
from memrt.errors import ConflictError
from memrt.optimizers.moment_rotation import rotate_moments_
from memrt.optimizers.subspace import Subspace
from memrt.profiling.accounts import Account
from memrt.profiling.ledger import Ledger
from memrt.runner import model_loss
from memrt.session import Session
from memrt.testing import PlainModel, tiny_batches
from tests.strategies.runs import (
    assert_equal,
    assert_planned,
    batch_of,
    counted,
    gradients,
    model_of,
    states,
)

FAMILIES = ["llama", "gpt2", "bert", "plain"]
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "plain": {},
}
EPS = 2**-24


def build(family: str, **overrides: Any) -> nn.Module:
    return model_of(family, **{**NO_DROPOUT[family], **overrides})


def subspaces(run: Session) -> dict[str, Subspace]:
    found: dict[str, Subspace] = next(  # type: ignore[attr-defined]
        attachment for attachment in run.attachments if attachment.name == "galore"
    ).subspaces
    return found


def backward(run: Session, family: str, *, seed: int = 0, **shape: int) -> None:
    torch.manual_seed(500 + seed)
    with run.micro_batch():
        run.backward(model_loss(run.model, batch_of(family, seed=seed, **shape)))


def train(run: Session, family: str, *, first: int = 0, count: int) -> None:
    for step in range(first, first + count):
        backward(run, family, seed=step)
        run.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_gradients(model: nn.Module, family: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Of the same model before any strategy."""
    model.zero_grad()
    torch.manual_seed(500 + seed)
    model_loss(model, batch_of(family, seed=seed)).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def project(gradient: Tensor, subspace: Subspace) -> Tensor:
    """What R must be, from a gradient that was formed."""
    basis = subspace.tensors()["basis"].double()
    if subspace.side == "left":
        return basis.t() @ gradient.double()
    return gradient.double() @ basis


def inject(run: Session, basis: str) -> None:
    """Frozen bases: the identity, or a given random rotation of rank 4."""
    generator = torch.Generator().manual_seed(1)
    for subspace in subspaces(run).values():
        size = min(subspace.weight_shape)
        noise = torch.randn(size, 4, generator=generator)
        subspace.set_basis(torch.eye(size) if basis == "identity" else torch.linalg.qr(noise).Q)


# ---------------------------------------------------------------- the gradient's projection


@pytest.mark.parametrize("family", FAMILIES)
def test_what_arrives_is_the_projection_of_the_gradient(family: str) -> None:
    """Of every linear weight of every layer, transposed `Conv1D` and fused QKV included."""
    model = build(family)
    plain = plain_gradients(model, family)
    run = memrt.prepare(model, ["galore(rank=4)"])
    backward(run, family)
    found = subspaces(run)
    assert len(found) == {"llama": 28, "gpt2": 16, "bert": 24, "plain": 8}[family]
    for name, subspace in found.items():
        observed = subspace.gradient()
        assert observed is not None
        assert observed.dtype == torch.float32
        assert observed.shape == subspace.shape
        expected = project(plain[name], subspace)
        # 32 tokens are summed in another order, in fp32, by either
        limit = (
            4 * 32 * EPS * float(plain[name].abs().max()) * max(1.0, plain[name].shape[0] ** 0.5)
        )
        assert float((observed - expected).abs().max()) <= limit, name


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_keeps_its_gradient(family: str) -> None:
    """Bit for bit: the forward and the gradients of activations are those of the plain layers."""
    model = build(family)
    plain = plain_gradients(model, family)
    run = memrt.prepare(model, ["galore(rank=4)"])
    backward(run, family)
    dense = gradients(model)
    assert dense.keys() == plain.keys() - subspaces(run).keys()
    outside = [name for name in dense if run.facts.structure.layer_of(name) is None]
    assert len(outside) == {"llama": 3, "gpt2": 4, "bert": 10, "plain": 3}[family]
    for name, gradient in dense.items():
        limit = 4 * 32 * EPS * float(max(g.abs().max() for g in plain.values()))
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=limit)


def test_a_fused_qkv_of_gpt2_is_projected_on_its_smaller_side() -> None:
    run = memrt.prepare(build("gpt2"), ["galore(rank=4)"])
    subspace = subspaces(run)["transformer.h.0.attn.c_attn.weight"]
    assert subspace.weight_shape == (32, 96)  # Conv1D: [in, out]
    assert (subspace.side, subspace.shape) == ("left", (4, 96))
    down = subspaces(run)["transformer.h.0.mlp.c_proj.weight"]
    assert (down.weight_shape, down.side, down.shape) == ((128, 32), "right", (128, 4))


@pytest.mark.parametrize(("targets", "expected"), [("all", 28), ("attention", 16), ("mlp", 12)])
def test_targets(targets: str, expected: int) -> None:
    run = memrt.prepare(build("llama"), [f"galore(rank=4, targets={targets!r})"])
    names = subspaces(run)
    assert len(names) == expected
    attention = {name for name in names if "self_attn" in name}
    assert len(attention) == {"all": 16, "attention": 16, "mlp": 0}[targets]


# ---------------------------------------------------------------- AdamW


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_identity_as_basis_it_is_adamw(family: str) -> None:
    """torch's AdamW on what arrives, which by the test above is the gradient, moves alike.

    Decay, direction and step are rounded one after the other here: a few roundings of lr times a
    direction of at most 3 (1 / sqrt(1 - beta2) would be 10), and one or two of the weight.
    """
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    model, plain = build(family), build(family)
    run = memrt.prepare(model, ["galore(rank=4, scale=1.0)"], **options)
    inject(run, "identity")
    optimizer = torch.optim.AdamW(plain.parameters(), fused=True, **options)
    for step in range(5):
        backward(run, family, seed=step)
        arrived = {name: s.gradient() for name, s in subspaces(run).items()}
        for name, parameter in plain.named_parameters():
            own = run.model.get_parameter(name).grad
            source = arrived.get(name, own)
            assert source is not None
            parameter.grad = source.clone()
        run.step()
        optimizer.step()
        for name, parameter in plain.named_parameters():
            ours = model.get_parameter(name)
            if name not in arrived:
                assert torch.equal(ours, parameter), name
            else:
                atol = 4 * EPS * 1e-2 * 3
                torch.testing.assert_close(ours, parameter, rtol=2 * EPS, atol=atol)
                with torch.no_grad():
                    parameter.copy_(ours)


@pytest.mark.parametrize("rank", [32, 1000])
def test_a_rank_that_is_not_below_the_smaller_side_is_adamw_bit_for_bit(
    rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    model, plain = build("llama"), build("llama")
    with caplog.at_level(logging.WARNING):
        run = memrt.prepare(model, [f"galore(rank={rank})"], **options)
    assert caplog.messages == [
        f"galore: rank={rank} is not below the smaller side of 28 weights; they keep AdamW"
    ]
    assert not subspaces(run)
    assert run.norm_kind == "exact"
    optimizer = torch.optim.AdamW(plain.parameters(), fused=True, **options)
    for step in range(4):
        backward(run, "llama", seed=step)
        run.step()
        model_loss(plain, batch_of("llama", seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(weights(model), weights(plain))


def test_some_weights_may_be_below_the_rank(caplog: pytest.LogCaptureFixture) -> None:
    """Keys and values of two heads are [16, 32]."""
    run = memrt.prepare(build("llama"), ["galore(rank=16)"])
    assert len(subspaces(run)) == 20
    assert not [name for name in subspaces(run) if "k_proj" in name or "v_proj" in name]
    assert "of 8 weights" in caplog.text
    train(run, "llama", count=2)


def test_a_step_lies_in_the_subspace_and_is_scaled() -> None:
    """Without decay the update is -lr * scale * P N, and N is Adam's first direction: signs."""
    model = build("plain")
    run = memrt.prepare(model, ["galore(rank=4, scale=0.5)"], lr=0.1)
    before = weights(model)
    backward(run, "plain")
    arrived = {name: s.gradient().clone() for name, s in subspaces(run).items()}  # type: ignore[union-attr]
    run.step()
    for name, subspace in subspaces(run).items():
        basis = subspace.tensors()["basis"].double()
        moved = (model.get_parameter(name).detach() - before[name]).double()
        if subspace.side == "right":
            moved = moved.t()
        rest = moved - basis @ (basis.t() @ moved)
        # the weight is rounded to fp32 after the step
        rounding = EPS * float(before[name].abs().max() + 0.1)
        assert float(rest.abs().max()) <= 4 * rounding + 1e-6 * float(moved.abs().max())
        assert int(torch.linalg.matrix_rank(moved, atol=1e-4)) == 4
        gradient = arrived[name].double() if subspace.side == "left" else arrived[name].double().t()
        direction = gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(
            basis.t() @ moved, -0.1 * 0.5 * direction, rtol=1e-5, atol=32 * rounding
        )


def test_decay_is_not_scaled_and_does_not_need_the_subspace() -> None:
    model = build("plain")
    run = memrt.prepare(model, ["galore(rank=4, scale=1e-12)"], lr=0.1, weight_decay=0.5)
    before = weights(model)
    train(run, "plain", count=1)
    for name in subspaces(run):
        torch.testing.assert_close(
            model.get_parameter(name).detach(), before[name] * 0.95, rtol=2 * EPS, atol=1e-12
        )


def test_a_schedule_sets_the_size_of_the_step() -> None:
    moved = []
    for factor in (1.0, 0.25):
        model = build("plain")
        run = memrt.prepare(model, ["galore(rank=4)"], lr=0.1)
        assert run.optimizer is not None
        scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda _, f=factor: f)  # type: ignore[misc]
        before = weights(model)
        train(run, "plain", count=1)
        scheduler.step()
        moved.append({name: weights(model)[name] - before[name] for name in subspaces(run)})
    for name, whole in moved[0].items():
        torch.testing.assert_close(moved[1][name], whole * 0.25, rtol=1e-3, atol=4 * EPS)


# ---------------------------------------------------------------- refreshes


def test_refreshes_are_staggered_and_count_optimizer_steps() -> None:
    run = memrt.prepare(build("plain"), ["galore(rank=4, every=4)"])
    counts = []
    for step in range(9):
        for index in (0, 1):
            with run.micro_batch(last=index == 1):
                run.backward(model_loss(run.model, batch_of("plain", seed=2 * step + index)))
        run.step()
        counts.append([s.refresh_count for s in subspaces(run).values()])
    offsets = [0, 0, 1, 1, 2, 2, 3, 3]
    for step, found in enumerate(counts):
        due = [
            1 + sum(1 for past in range(1, step + 1) if (past - offset) % 4 == 0)
            for offset in offsets
        ]
        assert found == due, step


def test_bases_are_orthonormal_and_do_not_depend_on_the_global_generator() -> None:
    bases = []
    for seed in (1, 2):
        run = memrt.prepare(build("plain"), ["galore(rank=4)"])
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with run.micro_batch():
            run.backward(model_loss(run.model, batch_of("plain")))
        assert torch.equal(torch.get_rng_state(), before)
        bases.append({n: s.tensors()["basis"].clone() for n, s in subspaces(run).items()})
    assert_equal(bases[0], bases[1])
    for basis in bases[0].values():
        torch.testing.assert_close(basis.t() @ basis, torch.eye(4), rtol=0, atol=1e-5)
    run = memrt.prepare(build("plain"), ["galore(rank=4, seed=7)"])
    backward(run, "plain")
    other = {name: s.tensors()["basis"] for name, s in subspaces(run).items()}
    assert not any(torch.equal(other[name], basis) for name, basis in bases[0].items())


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("family", ["llama", "gpt2", "plain"])
def test_four_quarter_batches_are_one_batch(family: str) -> None:
    whole = batch_of(family, batch=4)
    whole["attention_mask"].fill_(1)
    whole["labels"] = whole["input_ids"].clone()  # as many labels in every quarter
    results = []
    for parts in (1, 4):
        model = build(family)
        run = memrt.prepare(model, ["galore(rank=4)"], lr=1e-3)
        inject(run, "random")
        for index in range(parts):
            rows = slice(index * 4 // parts, (index + 1) * 4 // parts)
            with run.micro_batch(last=index == parts - 1):
                part = {name: tensor[rows] for name, tensor in whole.items()}
                run.backward(model_loss(model, part) / parts)
        results.append({name: s.gradient().clone() for name, s in subspaces(run).items()})  # type: ignore[union-attr]
        run.step()
        assert all(s.gradient() is None for s in subspaces(run).values())
    largest = max(float(gradient.abs().max()) for gradient in results[0].values())
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=4 * 64 * EPS * largest)


# ---------------------------------------------------------------- bytes

PROJECTED_BYTES = {32 * 32 * 4, 16 * 32 * 4, 64 * 32 * 4}
"""Of q and o, k and v, gate, up and down in the tiny Llama."""
LENGTH = 9  # 18 tokens: no activation has the size of a weight


def _sizes_in_backward(strategies: list[str], *, micro_batches: int) -> set[int]:
    ledger = Ledger()
    with ledger:
        run = memrt.prepare(build("llama"), strategies, ledger=ledger)
        train_since = ledger.timeline.now
        for index in range(micro_batches):
            backward(run, "llama", seed=index, length=LENGTH)
    return {r.num_bytes for r in ledger.timeline.records if r.birth >= train_since}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_no_gradient_of_a_projected_weight_is_ever_formed(micro_batches: int) -> None:
    assert _sizes_in_backward([], micro_batches=micro_batches) >= PROJECTED_BYTES
    sizes = _sizes_in_backward(["galore(rank=4)"], micro_batches=micro_batches)
    assert not PROJECTED_BYTES & sizes


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_gradients_account_is_dense_outside_and_r_inside(micro_batches: int) -> None:
    model = build("llama")
    run = memrt.prepare(model, ["galore(rank=4)"])
    names = set(subspaces(run))
    inside = sum(4 * s.shape[0] * s.shape[1] for s in subspaces(run).values())
    run.detach()
    dense = sum(4 * p.numel() for name, p in model.named_parameters() if name not in names)
    window = [batch_of("llama", seed=seed) for seed in range(micro_batches)]
    timeline = counted(model, ["galore(rank=4)"], window)
    assert timeline.account_maxima()["gradients"] == dense + inside


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [2, 5])
def test_state_bytes_are_the_formula(family: str, rank: int) -> None:
    """4 m r for the basis and 8 n r for the moments of a weight with sides m <= n."""
    model = build(family)
    run = memrt.prepare(model, [f"galore(rank={rank})"])
    train(run, family, count=1)
    assert run.optimizer is not None
    found, expected = states(run.optimizer, model), 0
    for name, parameter in model.named_parameters():
        own = sum(t.numel() * t.element_size() for t in found[name].values())
        if name in subspaces(run):
            small, large = sorted(parameter.shape)
            held = subspaces(run)[name].tensors()
            assert held.keys() == {"basis"}
            assert held["basis"].numel() * held["basis"].element_size() == 4 * small * rank
            assert own == 8 * large * rank + 4
            expected += 4 * small * rank
        else:
            assert own == 8 * parameter.numel() + 4
        expected += own
    run.detach()
    timeline = counted(build(family), [f"galore(rank={rank})"], [batch_of(family)])
    assert timeline.account_maxima()[Account.OPTIMIZER.value] == expected


def test_with_int8_states_the_moments_take_two_bytes_an_element() -> None:
    """Of R's elements, where those are 4096 or more; the basis stays fp32."""
    model = build("plain", hidden=128, layers=1)
    run = memrt.prepare(model, ["galore(rank=16)", "int8_states"])
    train(run, "plain", count=1)
    assert run.optimizer is not None
    state = states(run.optimizer, model)["layers.0.1.weight"]  # [256, 128]: R is [256, 16]
    assert state["exp_avg_codes"].shape == (256, 16)
    own = sum(t.numel() * t.element_size() for t in state.values())
    assert own == 2 * 4096 + 2 * 16 * 4 + 4


# ---------------------------------------------------------------- norm and clipping


def test_the_exact_norm_is_that_of_plain_autograd_and_the_projected_one_is_less() -> None:
    model = build("llama")
    plain = plain_gradients(model, "llama")
    true = float(torch.stack([g.double().square().sum() for g in plain.values()]).sum().sqrt())
    found = []
    for kind in ("projected", "exact"):
        run = memrt.prepare(model, [f"galore(rank=4, norm={kind!r})"])
        assert run.norm_kind == kind
        backward(run, "llama")
        found.append(float(run.gradient_norm()))
        run.detach()
        model.zero_grad()
    projected, exact = found
    assert exact == pytest.approx(true, rel=1e-5)
    assert 0.5 * true < projected < true * (1 - 1e-4)


def test_the_projected_norm_is_that_of_r_and_the_dense_gradients() -> None:
    run = memrt.prepare(build("llama"), ["galore(rank=4)"])
    backward(run, "llama")
    parts = [*gradients(run.model).values()]
    parts += [g for s in subspaces(run).values() if (g := s.gradient()) is not None]
    expected = torch.stack([g.double().square().sum() for g in parts]).sum().sqrt()
    assert float(run.gradient_norm()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["projected", "exact"])
def test_clipping_scales_dense_gradients_and_r_alike(kind: str) -> None:
    limit = 1e-2
    spec = f"galore(rank=4, norm={kind!r})"
    clipped = memrt.prepare(build("llama"), [spec], lr=1e-2, max_grad_norm=limit)
    by_hand = memrt.prepare(build("llama"), [spec], lr=1e-2)
    for step in range(3):
        backward(clipped, "llama", seed=step)
        norm = clipped.step()
        backward(by_hand, "llama", seed=step)
        factor = torch.clamp(limit / (by_hand.gradient_norm() + 1e-6), max=1.0)
        assert norm is not None
        assert float(norm) > 10 * limit  # clipping bites
        for parameter in by_hand.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        for subspace in subspaces(by_hand).values():
            gradient = subspace.gradient()
            assert gradient is not None
            gradient.mul_(factor)
        by_hand.step()
        assert_equal(weights(clipped.model), weights(by_hand.model))


def test_the_exact_norm_is_refused_over_several_micro_batches() -> None:
    from memrt import registry
    from memrt.structure import RunSettings

    with pytest.raises(ConflictError, match="norm='exact' cannot be had over several micro-batch"):
        Session(
            build("llama"),
            registry.parse_all(["galore(rank=4, norm='exact')"]),
            settings=RunSettings(accumulation_steps=2),
        )
    run = memrt.prepare(build("llama"), ["galore(rank=4, norm='exact')"])
    backward(run, "llama")
    with pytest.raises(RuntimeError, match="needs a single micro-batch"):
        backward(run, "llama", seed=1)


class _Repeating(PlainModel):
    """Its layers run twice a forward, as ALBERT's shared ones do."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.embedding(input_ids)
        for layer in [*self.layers, *self.layers]:
            hidden = hidden + layer(hidden)
        return {"loss": self.head(hidden).square().mean()}


def test_the_exact_norm_is_refused_of_layers_that_run_twice_by_that_cause() -> None:
    run = memrt.prepare(_Repeating().train(), ["galore(rank=4, norm='exact')"])
    cause = r"in one forward, as shared layers do\): use norm='projected', the default"
    with pytest.raises(RuntimeError, match=cause):
        backward(run, "plain")
    run = memrt.prepare(_Repeating().train(), ["galore(rank=4)"])
    backward(run, "plain")
    run.step()


# ---------------------------------------------------------------- weights that cannot be projected


def test_tied_weights_are_never_projected() -> None:
    model = PlainModel()
    model.layers[2][1].weight = model.layers[0][1].weight
    run = memrt.prepare(model.train(), ["galore(rank=4)"])
    names = set(subspaces(run))
    assert len(names) == 6
    assert not {"layers.0.1.weight", "layers.2.1.weight"} & names
    train(run, "plain", count=2)


def test_embeddings_and_head_are_never_projected() -> None:
    for family in FAMILIES:
        run = memrt.prepare(build(family), ["galore(rank=4)"])
        assert all(run.facts.structure.layer_of(name) for name in subspaces(run))


class _ReadsWeight(nn.Module):
    """A layer that uses its linear's weight in another way as well, or only."""

    def __init__(self, *, calls_module: bool) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 16)
        self._calls_module = calls_module

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.linear(x, self.up.weight)
        return self.down(self.up(x) if self._calls_module else x)


class _Reader(nn.Module):
    def __init__(self, *, calls_module: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_ReadsWeight(calls_module=calls_module) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.mark.parametrize("calls_module", [True, False])
def test_a_weight_that_is_read_outside_its_module_is_named(calls_module: bool) -> None:
    """Its gradient would be split in two, and half of it stepped in full."""
    run = memrt.prepare(_Reader(calls_module=calls_module).train(), ["galore(rank=4)"])
    with (
        pytest.raises(RuntimeError, match=r"galore: layers\.0\.up\.weight is used outside"),
        run.micro_batch(),
    ):
        run.backward(run.model(torch.randn(3, 16)))


def test_a_linear_layer_with_a_forward_of_its_own_is_left_alone() -> None:
    """It computes something else, which a projected linear layer would not."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0

    model, plain = PlainModel(), PlainModel()
    for each in (model, plain):
        torch.manual_seed(0)
        for layer in each.layers:
            layer[1] = Doubled(32, 64)
    plain.load_state_dict(model.state_dict())
    run = memrt.prepare(model.train(), ["galore(rank=4)"])
    assert {name.split(".")[2] for name in subspaces(run)} == {"3"}
    batch = batch_of("plain")
    with run.micro_batch():
        loss = model_loss(model, batch)
        assert torch.equal(loss, model_loss(plain, batch))
        run.backward(loss)


def test_a_linear_layer_whose_forward_was_replaced_is_left_alone() -> None:
    """As accelerate's hooks do it: the class's forward would not run."""
    model = build("plain")
    layer = model.layers[1][1]
    layer.forward = layer.forward
    run = memrt.prepare(model, ["galore(rank=4)"])
    assert len(subspaces(run)) == 7
    assert "layers.1.1.weight" not in subspaces(run)
    train(run, "plain", count=1)


def test_frozen_weights_are_not_projected() -> None:
    model = build("plain")
    model.layers[1].requires_grad_(False)
    run = memrt.prepare(model, ["galore(rank=4)"])
    assert not [name for name in subspaces(run) if name.startswith("layers.1.")]


# ---------------------------------------------------------------- with the rest of a run


@pytest.mark.parametrize("family", ["llama", "plain"])
@pytest.mark.parametrize("stop", [2, 6, 7])
def test_resume_between_two_refreshes(family: str, stop: int) -> None:
    spec, options = "galore(rank=4, every=4)", {"lr": 1e-2, "weight_decay": 0.1}
    whole = memrt.prepare(build(family), [spec], **options)
    train(whole, family, count=11)
    stopped = memrt.prepare(build(family), [spec], **options)
    train(stopped, family, count=stop)
    buffer = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "run": stopped.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    resumed = memrt.prepare(build(family, seed=9), [spec], **options)
    train(resumed, family, count=1)  # what this run found by itself must be forgotten
    resumed.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["run"])
    train(resumed, family, first=stop, count=11 - stop)
    assert_equal(weights(resumed.model), weights(whole.model))
    counts = [{n: s.refresh_count for n, s in subspaces(r).items()} for r in (resumed, whole)]
    assert counts[0] == counts[1]


def test_the_state_of_other_weights_is_refused() -> None:
    saved = memrt.prepare(build("llama"), ["galore(rank=4)"])
    train(saved, "llama", count=1)
    own = saved.strategy_state()["strategies"]["galore"]
    for spec, words in (
        ("galore(rank=4, targets='mlp')", r"galore state for 28 weights, this run projects 12"),
        ("galore(rank=3)", r"saved basis is \(32, 4\).*resume with its rank"),
    ):
        other = memrt.prepare(build("llama"), [spec])
        with pytest.raises(ValueError, match=r"was written with galore\(rank=4\)"):
            other.load_state_dict(saved.state_dict())
        with pytest.raises(ValueError, match=words):  # of settings that are equal, too
            other.attachments[0].load_state_dict(own)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_no_bit(family: str) -> None:
    """What is recomputed runs the same forward, and each gradient arrives once."""
    ends = []
    for stack in (
        ["galore(rank=4, every=2)"],
        ["galore(rank=4, every=2)", "activation_checkpoint"],
    ):
        run = memrt.prepare(model_of(family), stack, lr=1e-2)  # dropout on in GPT-2
        train(run, family, count=4)
        ends.append(weights(run.model))
    assert_equal(ends[0], ends[1])


def test_evaluation_between_steps_adds_nothing() -> None:
    ends = []
    for evaluates in (False, True):
        run = memrt.prepare(build("llama"), ["galore(rank=4)"], lr=1e-2)
        for step in range(3):
            train(run, "llama", first=step, count=1)
            if evaluates:
                run.model.eval()
                with torch.no_grad():
                    run.model(**batch_of("llama", seed=99))
                run.model.train()
                assert all(s.gradient() is None for s in subspaces(run).values())
        ends.append(weights(run.model))
    assert_equal(ends[0], ends[1])


def test_a_step_that_was_abandoned_leaves_nothing() -> None:
    """As after an exception in the middle of a window."""
    ends = []
    for fails in (False, True):
        run = memrt.prepare(build("llama"), ["galore(rank=4)"], lr=1e-2)
        train(run, "llama", count=1)
        if fails:
            backward(run, "llama", seed=50)
            run.abandon_step()
            run.model.zero_grad()
        train(run, "llama", first=1, count=2)
        ends.append(weights(run.model))
    assert_equal(ends[0], ends[1])


def test_a_bf16_model() -> None:
    """R is fp32, and as near to the truth as bf16 activations allow."""
    model = build("llama", dtype=torch.bfloat16)
    plain = plain_gradients(model, "llama")
    run = memrt.prepare(model, ["galore(rank=4)"], lr=1e-2)
    backward(run, "llama")
    for name, subspace in subspaces(run).items():
        observed = subspace.gradient()
        assert observed is not None
        assert observed.dtype == subspace.tensors()["basis"].dtype == torch.float32
        expected = project(plain[name], subspace)
        error = float((observed - expected).norm())
        assert error <= 4 * 2**-8 * float(plain[name].double().norm()), name
    before = weights(model)
    run.step()
    moved = [name for name in subspaces(run) if not torch.equal(weights(model)[name], before[name])]
    assert len(moved) == len(subspaces(run))
    train(run, "llama", first=1, count=3)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


def test_under_autocast_the_products_stay_fp32() -> None:
    model = build("llama")
    run = memrt.prepare(model, ["galore(rank=4)"])
    inject(run, "random")
    with run.micro_batch(), torch.autocast("cpu", dtype=torch.bfloat16):
        run.backward(model_loss(model, batch_of("llama")))
    found = {n: s.gradient().clone() for n, s in subspaces(run).items()}  # type: ignore[union-attr]
    model.zero_grad()
    run.abandon_step()
    bases = {n: s.tensors()["basis"].double() for n, s in subspaces(run).items()}
    sides = {n: s.side for n, s in subspaces(run).items()}
    run.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model_loss(model, batch_of("llama"))
    loss.backward()
    for name, plain in gradients(model).items():
        if name in found:
            basis, gradient = bases[name], plain.double()
            expected = basis.t() @ gradient if sides[name] == "left" else gradient @ basis
            # the plain gradient is rounded to bf16, R is not
            error = float((found[name] - expected).norm())
            assert error <= 2 * 2**-8 * float(gradient.norm()), name


# ---------------------------------------------------------------- rotated moments


@pytest.mark.parametrize(("form", "count"), [("gradient_free", 1), ("plain", 2)])
def test_a_refresh_rotates_the_moments(form: str, count: int) -> None:
    """Until it, all bits are those of moments that stay; in it, R is the same."""
    kept, rotated = (
        memrt.prepare(
            build("plain"), [f"galore(rank=4, every=2, form={form!r}, moments={moments!r})"]
        )
        for moments in ("kept", "rotated")
    )
    for run in (kept, rotated):
        train(run, "plain", count=count)
    assert_equal(weights(rotated.model), weights(kept.model))
    assert kept.optimizer is not None
    assert rotated.optimizer is not None
    before = states(rotated.optimizer, rotated.model)
    bases = {name: each.tensors()["basis"].clone() for name, each in subspaces(rotated).items()}
    for run in (kept, rotated):
        train(run, "plain", first=count, count=1)
    moved = 0
    for name, each in subspaces(rotated).items():
        old, found = before[name], states(rotated.optimizer, rotated.model)[name]
        other = states(kept.optimizer, kept.model)[name]
        if each.refresh_count == 1:
            assert torch.equal(found["exp_avg"], other["exp_avg"])
            continue
        moved += 1
        expected = {key: old[key].clone() for key in ("exp_avg", "exp_avg_sq")}
        rotate_moments_(
            *expected.values(),
            each.tensors()["basis"].t() @ bases[name],
            is_left=each.side == "left",
            betas=(0.9, 0.999),
            step=torch.tensor(float(count)),
        )
        for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
            change = found[key] - other[key]  # the new R adds the same to both
            truth = beta * (expected[key] - old[key])
            largest = float(torch.maximum(found[key].abs(), other[key].abs()).max())
            torch.testing.assert_close(change, truth, rtol=1e-5, atol=4 * EPS * largest)
            assert change.abs().max() > 0
    assert moved


def test_the_first_basis_and_one_that_was_put_in_rotate_nothing() -> None:
    run = memrt.prepare(build("plain"), ["galore(rank=4, every=1, moments='rotated')"])
    backward(run, "plain")
    for each in subspaces(run).values():
        assert each.take_rotation() is None
        each.clear()
        each.set_basis(torch.eye(each.tensors()["basis"].shape[0])[:, :4])
        assert each.take_rotation() is None


def test_a_step_that_is_left_out_rotates_nothing() -> None:
    """The next one refreshes from the same basis, and rotates then."""
    run = memrt.prepare(build("plain"), ["galore(rank=4, every=2, moments='rotated')"])
    other = memrt.prepare(build("plain"), ["galore(rank=4, every=2, moments='rotated')"])
    for each in (run, other):
        train(each, "plain", count=2)
    with run.micro_batch():
        run.backward(model_loss(run.model, batch_of("plain", seed=7)) * float("inf"))
    run.step()
    assert_equal(weights(run.model), weights(other.model))
    assert all(each.take_rotation() is None for each in subspaces(run).values())
    assert run.optimizer is not None
    assert other.optimizer is not None
    for name, state in states(run.optimizer, run.model).items():
        assert_equal(state, states(other.optimizer, other.model)[name])


def test_rotated_moments_are_planned_to_the_byte() -> None:
    window = tiny_batches("llama", count=1)
    spec = "galore(rank=4, every=1, moments='rotated')"
    assert_planned(lambda: build("llama"), [spec], window)


@pytest.mark.parametrize("other", ["int8_states", "fp8_states", "int4_states"])
def test_moments_of_few_bits_are_not_rotated(other: str) -> None:
    with pytest.raises(ConflictError, match=rf"moments='rotated' would round .* {other} keeps"):
        memrt.prepare(build("llama"), ["galore(rank=4, moments='rotated')", other])
    with pytest.raises(ValueError, match=r"moments='rotated' .* give state_format='float32'"):
        memrt.prepare(build("llama"), ["q_galore(rank=4, moments='rotated')"])
    run = memrt.prepare(
        build("llama"), ["q_galore(rank=4, moments='rotated', state_format='float32', every=1)"]
    )
    train(run, "llama", count=3)


# ---------------------------------------------------------------- refusals


def test_another_update_rule_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ConflictError, match=r"galore: optimizer='SGD'.*use AdamW"):
        memrt.prepare(model, ["galore(rank=4)"], optimizer=torch.optim.SGD(model.parameters()))


def test_a_model_without_targets_is_refused() -> None:
    with pytest.raises(ConflictError, match=r"targets='attention' matches no trainable linear"):
        memrt.prepare(build("plain"), ["galore(targets='attention')"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("galore(rank=0)", r"rank=0: must be"),
        ("galore(every=True)", r"every=True: must be"),
        ("galore(scale=0)", r"scale=0: must be"),
        ("galore(scale=True)", r"scale=True: must be"),
        ("galore(targets='head')", r"targets='head': use one of all, attention, mlp"),
        ("galore(moments='reset')", r"moments='reset': use one of kept, rotated"),
        ("galore(norm='true')", r"norm='true': use one of projected, exact"),
    ],
)
def test_values_are_checked(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memrt.prepare(build("plain"), [spec])
