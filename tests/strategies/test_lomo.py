"""LOMO and AdaLomo: the rule, its time, its bytes and what it is not combined with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memrt
from memrt.errors import ConflictError
from memrt.optimizers.adalomo import AdaLomo
from memrt.optimizers.lomo import Lomo
from memrt.registry import parse_all
from memrt.runner import model_loss, start, train_step
from memrt.structure import RunSettings
from memrt.testing import tiny_batches
from tests.strategies.active_runs import steps_of, train, weights
from tests.strategies.runs import assert_equal, assert_planned, batch_of, counted, model_of

NAMES = ("lomo", "adalomo")
OPTIMIZERS: dict[str, Any] = {"lomo": Lomo, "adalomo": AdaLomo}
CLIP = 0.3


@pytest.mark.parametrize("max_norm", [0.0, CLIP], ids=["free", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_in_backward_it_has_the_bits_of_its_rule_after_backward(
    name: str, dtype: torch.dtype, max_norm: float
) -> None:
    """The reference: a plain loop, `clip_grad_norm_`, the optimizer. Head and embedding are one,
    layers are checkpointed, the schedule moves."""
    plain, model = model_of("gpt2", dtype=dtype), model_of("gpt2", dtype=dtype)
    options = {"lr": 5e-2, "weight_decay": 0.1, "rounding_seed": 42}  # of `prepare`
    reference = OPTIMIZERS[name](plain.parameters(), **options)
    clip = "two_pass" if max_norm else "none"
    run = memrt.prepare(
        model,
        [f"{name}(clip={clip!r})", "activation_checkpoint"],
        lr=5e-2,
        weight_decay=0.1,
        max_grad_norm=max_norm,
    )
    assert type(run.optimizer) is OPTIMIZERS[name]
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        for optimizer in (reference, run.optimizer)
    ]
    for step in steps_of(run, "gpt2", count=4):
        torch.manual_seed(500 + step)
        model_loss(plain, batch_of("gpt2", seed=10 * step)).backward()
        if max_norm:
            gradients = [p.grad for p in plain.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).float()
            torch.nn.utils.clip_grads_with_norm_(plain.parameters(), max_norm, norm)
            assert norm > max_norm
        reference.step()
        reference.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert_equal(weights(model), weights(plain))


@pytest.mark.parametrize("max_norm", [0.0, CLIP], ids=["free", "clipped"])
def test_the_authors_lomo_makes_the_same_steps(max_norm: float) -> None:
    """lomo-optim 0.1.1; it clips with `grad_norm`, a backward pass before the one that updates."""
    package = pytest.importorskip("lomo_optim", reason="pip install lomo-optim --no-deps")
    plain, model = model_of("llama"), model_of("llama")
    clip = {"clip_grad_norm": max_norm} if max_norm else {}
    peer = package.Lomo(plain, lr=0.3, weight_decay=0.1, **clip)
    spec = "lomo(clip='two_pass')" if max_norm else "lomo"
    run = memrt.prepare(model, [spec], lr=0.3, weight_decay=0.1, max_grad_norm=max_norm)
    for step in steps_of(run, "llama", count=4):
        loss = model_loss(plain, batch_of("llama", seed=10 * step))
        if max_norm:
            peer.grad_norm(loss)
            assert peer.clip_coef < 1
        peer.fused_backward(loss, 0.3)
    for (name, mine), yours in zip(model.named_parameters(), plain.parameters(), strict=True):
        # their 1e-6 beside the norm, and a rounding of each of the 4 steps
        limit = (4e-6 + 4 * 4 * torch.finfo(torch.float32).eps) * yours.detach().abs().max()
        assert (mine - yours).detach().abs().max() <= limit, name


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_state_and_gradients_are_those_of_the_formula(name: str) -> None:
    model = model_of("llama", layers=6)
    sizes = sorted(4 * p.numel() for p in model.parameters())
    state = {
        "lomo": 0,
        "adalomo": sum(4 * (1 + sum(p.shape)) for p in model.parameters()),
    }
    window = tiny_batches("llama", count=1)
    accounts = counted(model, [name], window).account_maxima()
    assert accounts["optimizer"] == state[name]
    assert sizes[-1] <= accounts["gradients"] <= sizes[-1] + sizes[-2]
    assert accounts["weights"] == sum(sizes) + sum(4 * b.numel() for b in model.buffers())


@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_are_rounded_as_the_run_says(name: str) -> None:
    found = []
    for options in ({}, {"seed": 7}, {"stochastic_rounding": False}):
        model = model_of("plain", dtype=torch.bfloat16)
        run = memrt.prepare(model, [name], lr=1e-3, **options)  # type: ignore[arg-type]
        train(run, "plain", count=2)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    before = torch.cat(
        [p.detach().flatten() for p in model_of("plain", dtype=torch.bfloat16).parameters()]
    )
    ours, seeded, nearest = found
    assert not torch.equal(ours, seeded)
    assert int((ours != before).sum()) > int((nearest != before).sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_of_bf16_weights_is_the_ledger(name: str) -> None:
    assert_planned(
        lambda: model_of("llama", dtype=torch.bfloat16), [name], tiny_batches("llama", count=1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_several_micro_batches_are_summed_first(name: str) -> None:
    plain, model = model_of("plain"), model_of("plain")
    reference = OPTIMIZERS[name](plain.parameters(), lr=1e-2)
    run = memrt.prepare(model, [f"{name}(clip='two_pass')"], lr=1e-2)
    for step in steps_of(run, "plain", count=3, micro_batches=3):
        for index in range(3):
            model_loss(plain, batch_of("plain", seed=10 * step + index)).backward()
        reference.step()
        reference.zero_grad()
    assert_equal(weights(model), weights(plain))


@pytest.mark.parametrize("name", NAMES)
def test_the_one_pass_form_refuses_several_micro_batches(name: str) -> None:
    """Up front where their number is known, and in a plain loop before the first backward."""
    said = rf"one micro-batch a step .* or {name}\(clip='two_pass'\)"
    with pytest.raises(ConflictError, match=said):
        memrt.prepare(model_of("plain"), [name], accumulation_steps=2)
    model = model_of("plain")
    run, before = memrt.prepare(model, [name], lr=1e-2), weights(model)
    with pytest.raises(ValueError, match=said), run.micro_batch(last=False):
        pytest.fail("the micro-batch began")
    assert_equal(weights(model), before)
    train(run, "plain", count=1)
    assert any(not torch.equal(value, before[n]) for n, value in weights(model).items())


@pytest.mark.parametrize(
    ("spec", "rate"), [("lomo(clip='two_pass')", 0.3), ("adalomo", 5e-2)], ids=NAMES
)
def test_it_learns(spec: str, rate: float) -> None:
    """Ids that follow each other: far below the loss of a uniform guess, 4.6."""
    settings = RunSettings(learning_rate=rate, max_grad_norm=1.0 if "two" in spec else 0.0)
    run = start(model_of("llama", layers=2), parse_all([spec]), settings=settings)
    for step in range(120):
        train_step(run, tiny_batches("llama", count=1, seed=step, batch=8, length=16))
    assert sum(run.losses[-5:]) / 5 < 3.0


def test_elements_of_gradients_are_bounded_in_the_one_pass() -> None:
    plain, model = model_of("plain"), model_of("plain")
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, foreach=False)
    run = memrt.prepare(model, ["lomo(clip_value=1e-3)"], lr=0.1)
    for step in steps_of(run, "plain", count=3):
        model_loss(plain, batch_of("plain", seed=10 * step)).backward()
        torch.nn.utils.clip_grad_value_(plain.parameters(), 1e-3)
        reference.step()
        reference.zero_grad()
    assert_equal(weights(model), weights(plain))


@pytest.mark.parametrize("name", NAMES)
def test_with_badam_one_block_moves(name: str) -> None:
    model = model_of("plain")
    run = memrt.prepare(model, [name, "badam(every=1, order='ascending')"], lr=1e-2)
    before = weights(model)
    train(run, "plain", count=1)
    after = weights(model)
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {n for n in after if n.startswith("layers.0.")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("other", "slot"),
    [
        ("in_backward", "update time"),
        ("int8_states", "state format"),
        ("galore(rank=4)", "projection"),
    ],
)
def test_another_owner_of_the_optimizer_is_refused_by_name(
    name: str, other: str, slot: str
) -> None:
    with pytest.raises(ConflictError) as refused:
        memrt.prepare(model_of("llama"), [name, other])
    assert any(name in p and other.split("(")[0] in p and slot in p for p in refused.value.problems)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.8, 0.999)}, r"betas=\(0.8, 0.999\) is AdamW's and has no effect"),
        ({"eps": 1e-6}, "epsilon=1e-06 is AdamW's and has no effect"),
        ({"max_grad_norm": 1.0}, r"use \w+\(clip='two_pass'\) .* or max_grad_norm=0"),
    ],
)
def test_settings_without_effect_are_refused(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConflictError, match=message):
        memrt.prepare(model_of("plain"), [name], **settings)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lomo(clip_value=0)", "clip_value=0: must be a number above 0, or None"),
        ("lomo(clip='value')", "clip='value': use one of none, two_pass"),
        ("adalomo(clip_threshold=-1.0)", "clip_threshold=-1.0: must be"),
        ("adalomo(clip_threshold=True)", "clip_threshold=True: must be"),
        ("adalomo(decay_rate=0.8)", r"decay_rate=0.8: must lie in \[-1, 0\)"),
    ],
)
def test_values_are_checked(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memrt.prepare(model_of("plain"), [spec])
