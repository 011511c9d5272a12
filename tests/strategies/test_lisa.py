"""LISA: what trains, what its optimizer state costs, and how layers are drawn."""

from __future__ import annotations

import copy
import io
import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memrt
from memrt.errors import ConflictError
from memrt.profiling.accounts import Account, Place
from memrt.profiling.ledger import Ledger
from memrt.runner import model_loss
from memrt.session import Session
from tests import trainer_runs
from tests.strategies.active_runs import (
    LAYERS,
    OUTSIDE,
    active_of,
    ideal_bytes,
    names_of,
    state_bytes,
    steps_of,
    train,
    weights,
)
from tests.strategies.runs import assert_equal, batch_of, model_of, states


def drawn(run: Session) -> list[int]:
    return active_of(run, "lisa")


# ---------------------------------------------------------------- checkpoints of transformers' own


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "spec",
    ["lisa(layers=1, every=1)", "lisa(layers=1, every=1, embeddings=False)", "badam(every=1)"],
)
def test_reentrant_checkpoints_change_no_bit(spec: str, family: str) -> None:
    """Where nothing before the layers trains they give no gradient to a layer, if nothing is done.

    transformers makes the embeddings' output want one.
    """
    found = []
    for reentrant in (False, True):
        model = model_of(family, layers=3)
        if reentrant:
            getattr(model, f"{trainer_runs.CHECKPOINTING}_enable")({"use_reentrant": True})
        run = memrt.prepare(model, [spec], lr=1e-2)
        before = weights(model)
        train(run, family, count=3)
        found.append(weights(model))
        assert any(not torch.equal(found[-1][n], before[n]) for n in before if ".0." in n)
    assert_equal(*found)


# ---------------------------------------------------------------- all layers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("parked", ["no", "host"])
def test_with_all_layers_it_is_adamw_bit_for_bit(family: str, parked: str) -> None:
    plain = model_of(family)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(7):
        torch.manual_seed(500 + step)
        model_loss(plain, batch_of(family, seed=10 * step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model = model_of(family)
    run = memrt.prepare(
        model, [f"lisa(layers={LAYERS}, every=2, parked={parked!r})"], lr=1e-2, weight_decay=0.1
    )
    train(run, family, count=7)
    assert_equal(weights(model), weights(plain))
    assert run.optimizer is not None
    ours, theirs = states(run.optimizer, model), states(optimizer, plain)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name])


# ---------------------------------------------------------------- what trains


@pytest.mark.parametrize("family", ["llama", "gpt2", "plain"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_in_an_interval_exactly_what_was_drawn_changes(family: str, embeddings: bool) -> None:
    """Weight decay included: what is frozen keeps its bits."""
    model = model_of(family)
    spec = f"lisa(layers=2, every=3, embeddings={embeddings})"
    run = memrt.prepare(model, [spec], lr=1e-2, weight_decay=0.5)
    seen = set()
    for interval in range(6):
        before = weights(model)
        train(run, family, first=3 * interval, count=3)
        after = weights(model)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        outside = OUTSIDE[family] if embeddings else set()
        assert len(drawn(run)) == 2
        assert changed == names_of(model, family, drawn(run)) | outside
        seen.add(tuple(drawn(run)))
    assert len(seen) > 1


def test_the_interval_counts_optimizer_steps_not_micro_batches() -> None:
    run = memrt.prepare(model_of("plain"), ["lisa(layers=1, every=4, seed=3)"])
    sets = []
    for _ in steps_of(run, "plain", count=12, micro_batches=3):
        sets.append(tuple(drawn(run)))
    assert [len(set(sets[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(sets)) > 1


def test_gradients_exist_for_what_trains_alone() -> None:
    model = model_of("llama")
    run = memrt.prepare(model, ["lisa(layers=1, every=2)"])
    for step in range(4):
        with run.micro_batch():
            run.backward(model_loss(model, batch_of("llama", seed=step)))
        held = {name for name, p in model.named_parameters() if p.grad is not None}
        assert held == names_of(model, "llama", drawn(run)) | OUTSIDE["llama"]
        run.step()


def test_what_the_user_froze_stays_frozen() -> None:
    model = model_of("plain")
    model.embedding.weight.requires_grad_(False)
    model.layers[1].requires_grad_(False)
    run = memrt.prepare(model, ["lisa(layers=1, every=1)"], lr=1e-2, weight_decay=0.5)
    before = weights(model)
    drawn_layers = set()
    for _ in steps_of(run, "plain", count=24):
        drawn_layers |= {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad}
    after = weights(model)
    kept = {name for name in after if torch.equal(after[name], before[name])}
    assert kept == names_of(model, "plain", [1]) | {"embedding.weight"}
    assert {"0", "2", "3"} <= drawn_layers  # each interval has a layer that can train


def test_the_gradient_norm_is_that_of_what_trains() -> None:
    model = model_of("llama")
    run = memrt.prepare(model, ["lisa(layers=1, every=1)"], max_grad_norm=1e-2)
    for step in range(3):
        with run.micro_batch():
            run.backward(model_loss(model, batch_of("llama", seed=step)))
        grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
        expected = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        norm = run.step()
        assert norm is not None
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)


# ---------------------------------------------------------------- optimizer state


def test_a_layer_whose_state_was_freed_begins_anew() -> None:
    model = model_of("plain")
    run = memrt.prepare(model, ["lisa(layers=1, every=2)"])
    assert run.optimizer is not None
    steps_since: Counter[str] = Counter()
    switches = 0
    previous: list[int] = []
    for step in steps_of(run, "plain", count=24):
        if drawn(run) != previous:
            steps_since = Counter({n: steps_since[n] for n in OUTSIDE["plain"]})
            switches += 1
        previous = drawn(run)
        for name, state in states(run.optimizer, model).items():
            steps_since[name] += 1
            assert int(state["step"]) == steps_since[name], (step, name)
    assert switches > 5


def test_the_first_update_of_a_drawn_layer_is_bias_corrected() -> None:
    """With t = 1 Adam's direction is the sign of the gradient: every element moves by lr."""
    model = model_of("plain")
    run = memrt.prepare(model, ["lisa(layers=1, every=1)"], lr=1e-3)
    train(run, "plain", count=10)
    for step in range(10, 20):
        torch.manual_seed(500 + step)
        before, previous = weights(model), drawn(run)
        train(run, "plain", first=step, count=1)
        if drawn(run) != previous:
            name = f"layers.{drawn(run)[0]}.1.weight"
            moved = (weights(model)[name] - before[name]).abs()
            assert float(moved.median()) == pytest.approx(1e-3, rel=1e-3)
            return
    raise AssertionError("no other layer was drawn")


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("make", [None, "sgd"])
def test_a_parked_state_comes_back_as_it_left(place: str, make: str | None) -> None:
    model = model_of("plain")
    optimizer = None
    if make == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    run = memrt.prepare(model, [f"lisa(layers=1, every=2, parked={place!r})"], optimizer=optimizer)
    assert run.optimizer is not None
    last: dict[str, dict[str, Any]] = {}
    returned = 0
    for step in range(30):
        run.begin_step()
        for name, state in states(run.optimizer, model).items():
            if name in last:
                returned += name not in OUTSIDE["plain"] and step % 2 == 0
                assert state.keys() == last[name].keys()
                for key in state:
                    assert torch.equal(
                        torch.as_tensor(state[key]), torch.as_tensor(last[name][key])
                    )
        train(run, "plain", first=step, count=1)
        last.update(states(run.optimizer, model))
    assert returned > 8
    assert set(last) == set(weights(model))


def test_parked_bytes_lie_on_the_host_and_are_optimizer_state() -> None:
    ledger = Ledger()
    with ledger:
        model = model_of("plain")
        run = memrt.prepare(model, ["lisa(layers=1, every=1, parked='host')"], ledger=ledger)
        visited: set[int] = set()
        for _ in steps_of(run, "plain", count=20):
            visited |= set(drawn(run))
            now = ledger.timeline.now - 1
            active = names_of(model, "plain", drawn(run)) | OUTSIDE["plain"]
            parked = names_of(model, "plain", sorted(visited - set(drawn(run))))
            device = ledger.timeline.breakdown(now, place=Place.DEVICE).accounts
            host = ledger.timeline.breakdown(now, place=Place.HOST).accounts
            assert device[Account.OPTIMIZER.value] == ideal_bytes(model, active)
            assert host[Account.OPTIMIZER.value] == ideal_bytes(model, parked)
            assert sum(host.values()) == host[Account.OPTIMIZER.value]
    assert visited == set(range(LAYERS))


def test_the_ledger_counts_no_more_state_and_gradients_than_what_trains() -> None:
    from tests.strategies.runs import counted

    model = model_of("plain")
    widest = ideal_bytes(model, names_of(model, "plain", [0]) | OUTSIDE["plain"])
    window = [batch_of("plain")]
    timeline = counted(model, ["lisa(layers=1, every=1)"], window, steps=12)
    maxima = timeline.account_maxima()
    assert maxima["optimizer"] == widest
    num_tensors = len(names_of(model, "plain", [0]) | OUTSIDE["plain"])
    assert maxima["gradients"] == (widest - 4 * num_tensors) // 2


# ---------------------------------------------------------------- other optimizers and schedules


def test_an_optimizer_of_the_user_trains_what_was_drawn() -> None:
    """SGD with momentum, compared to a loop that freezes by hand and drops the state."""
    model, plain = model_of("plain"), model_of("plain")
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    run = memrt.prepare(
        model,
        ["lisa(layers=1, every=2, seed=5)"],
        optimizer=torch.optim.SGD(model.parameters(), **options),
    )
    reference = torch.optim.SGD(plain.parameters(), **options)
    for step in steps_of(run, "plain", count=10):
        active = names_of(plain, "plain", drawn(run)) | OUTSIDE["plain"]
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name in active)
            if name not in active:
                reference.state.pop(parameter, None)
        torch.manual_seed(500 + step)
        model_loss(plain, batch_of("plain", seed=10 * step)).backward()
        reference.step()
        reference.zero_grad()
        assert_equal(weights(model), weights(plain))


def test_a_schedule_goes_on_as_without_it() -> None:
    rates = []
    for stack in ([], ["lisa(layers=1, every=2)"]):
        run = memrt.prepare(model_of("plain"), stack, lr=1e-2)
        assert run.optimizer is not None
        scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
        found = []
        for _ in steps_of(run, "plain", count=5):
            scheduler.step()
            found.append([group["lr"] for group in run.optimizer.param_groups])
        rates.append(found)
    assert rates[0] == rates[1]
    assert rates[0][0] != rates[0][4]


def test_the_trainers_schedule_goes_on_as_without_it(tmp_path: Path) -> None:
    def rates(strategies: list[str]) -> list[float]:
        trainer = trainer_runs.run(
            tmp_path / str(len(strategies)),
            family="llama",
            lr_scheduler_type="cosine",
            warmup_steps=2,
            max_steps=4,
            options={"strategies": strategies},
        )
        return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]

    plain = rates([])
    assert rates(["lisa(layers=1, every=2)"]) == plain
    assert len(set(plain)) > 2


# ---------------------------------------------------------------- draws


def _sets(layers: int, *, total: int, seed: int = 42, count: int) -> list[tuple[int, ...]]:
    model = model_of("plain", layers=total, hidden=4)
    run = memrt.prepare(model, [f"lisa(layers={layers}, every=1, seed={seed})"])
    draw: Callable[[int], list[int]] = run.attachments[0]._draw  # type: ignore[attr-defined]
    return [tuple(draw(interval)) for interval in range(count)]


def _chi_square(observed: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in observed)


def test_every_set_of_layers_is_drawn_equally_often() -> None:
    """Chi-square over the 10 pairs of 5 layers, 9 degrees of freedom: 1.15 to 27.9 in 99.8 %."""
    sets = Counter(_sets(2, total=5, count=3000))
    assert set(sets) == set(combinations(range(5), 2))
    assert 1.15 < _chi_square(list(sets.values()), 300) < 27.9


def test_draws_of_consecutive_intervals_are_independent() -> None:
    """Chi-square over the 16 pairs (layer now, layer next) of 4: 15 degrees of freedom."""
    one = [drawn_set[0] for drawn_set in _sets(1, total=4, count=3201)]
    pairs = Counter(pairwise(one))
    assert 3.4 < _chi_square([pairs[a, b] for a in range(4) for b in range(4)], 200) < 37.7


def test_draws_are_a_function_of_seed_and_interval_alone() -> None:
    one = _sets(2, total=6, count=40)
    random.seed(1)
    torch.manual_seed(77)
    before = random.getstate(), torch.get_rng_state()
    run = memrt.prepare(model_of("plain", layers=6, hidden=4, seed=8), ["lisa(every=1)"])
    before = random.getstate(), torch.get_rng_state()
    draw: Callable[[int], list[int]] = run.attachments[0]._draw  # type: ignore[attr-defined]
    other = {interval: tuple(draw(interval)) for interval in reversed(range(40))}
    assert [other[interval] for interval in range(40)] == one
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert _sets(2, total=6, seed=43, count=40) != one


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("family", ["plain", "gpt2"])
@pytest.mark.parametrize("parked", ["no", "host", "disk"])
def test_resume_in_the_middle_of_an_interval(family: str, parked: str) -> None:
    spec = f"lisa(layers=1, every=4, parked={parked!r}, seed=3)"
    whole = memrt.prepare(model_of(family), [spec], lr=1e-2, weight_decay=0.1)
    train(whole, family, count=22)

    stopped = memrt.prepare(model_of(family), [spec], lr=1e-2, weight_decay=0.1)
    train(stopped, family, count=14)
    buffer = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "run": stopped.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)

    resumed = memrt.prepare(model_of(family, seed=9), [spec], lr=1e-2, weight_decay=0.1)
    train(resumed, family, count=3)  # of its own, all of which must be forgotten
    assert drawn(resumed) != drawn(stopped)
    resumed.model.load_state_dict(state["model"])
    resumed.load_state_dict(copy.deepcopy(state["run"]))
    assert drawn(resumed) == drawn(stopped)
    places = {entry["place"] for entry in resumed.strategy_state()["parked"].values()}
    assert places == ({parked} if parked != "no" else set())
    active = {name for name, p in resumed.model.named_parameters() if p.requires_grad}
    assert active == names_of(resumed.model, family, drawn(stopped)) | OUTSIDE[family]
    train(resumed, family, first=14, count=8)
    assert_equal(weights(resumed.model), weights(whole.model))
    assert resumed.optimizer is not None
    assert whole.optimizer is not None
    assert state_bytes(resumed.optimizer) == state_bytes(whole.optimizer)


# ---------------------------------------------------------------- refusals


def test_more_layers_than_can_train_are_refused() -> None:
    model = model_of("plain")
    with pytest.raises(ConflictError, match=r"layers=5 is more than the 4 layers"):
        memrt.prepare(model, ["lisa(layers=5)"])
    model.layers[0].requires_grad_(False)
    with pytest.raises(ConflictError, match=r"layers=4 is more than the 3 layers .* trainable"):
        memrt.prepare(model, ["lisa(layers=4)"])


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConflictError, match="no list of repeated layers"):
        memrt.prepare(nn.Linear(4, 4), ["lisa"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lisa(layers=0)", r"layers=0: must be"),
        ("lisa(every=0.5)", r"every=0.5: must be"),
        ("lisa(embeddings='no')", r"embeddings='no': must be True or False"),
        ("lisa(parked='cpu')", r"parked='cpu': use one of no, host, disk"),
        ("lisa(seed=None)", r"seed=None: must be a whole number"),
        ("lisa(seed=[1])", r"seed=\[1\]: must be a whole number"),
    ],
)
def test_values_are_checked(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memrt.prepare(model_of("plain"), [spec])
