"""BAdam: whose turn it is, what changes in it, and what the optimizer keeps."""

from __future__ import annotations

import copy
import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import memrt
from memrt.errors import ConflictError
from memrt.runner import model_loss
from memrt.testing import tiny_config
from tests.strategies.active_runs import (
    LAYERS,
    active_of,
    ideal_bytes,
    names_of,
    state_bytes,
    steps_of,
    train,
    trainable,
    weights,
)
from tests.strategies.runs import assert_equal, batch_of, model_of, states
from tests.trainer_runs import trainer_of


def _turns(spec: str, *, count: int, family: str = "plain") -> list[int]:
    run = memrt.prepare(model_of(family, hidden=4), [spec])
    return [active_of(run, "badam")[0] for _ in steps_of(run, family, count=count)]


# ---------------------------------------------------------------- turns


@pytest.mark.parametrize(
    ("order", "expected"),
    [("ascending", [0, 1, 2, 3, 0, 1]), ("descending", [3, 2, 1, 0, 3, 2])],
)
def test_every_turn_has_as_many_steps_as_asked_the_first_included(
    order: str, expected: list[int]
) -> None:
    turns = _turns(f"badam(every=3, order={order!r})", count=18)
    assert turns == [block for block in expected for _ in range(3)]


def test_every_random_round_is_another_permutation() -> None:
    state = random.getstate(), torch.get_rng_state()
    one = memrt.prepare(model_of("plain"), ["badam(every=1)"]).attachments[0]
    other = memrt.prepare(model_of("plain", seed=3), ["badam(every=1)"]).attachments[0]
    assert random.getstate() == state[0]
    turns = [one._draw(i)[0] for i in range(200 * LAYERS)]  # type: ignore[attr-defined]
    rounds = [tuple(turns[i : i + LAYERS]) for i in range(0, len(turns), LAYERS)]
    assert all(sorted(each) == list(range(LAYERS)) for each in rounds)
    assert len(set(rounds)) == 24  # every order of four came
    assert turns[::-1] == [other._draw(i)[0] for i in reversed(range(800))]  # type: ignore[attr-defined]
    assert rounds[:8] != [
        tuple(_turns("badam(every=1, seed=7)", count=32)[i : i + 4]) for i in range(0, 32, 4)
    ]


def test_turns_count_optimizer_steps_not_micro_batches() -> None:
    run = memrt.prepare(model_of("plain"), ["badam(every=2, order='ascending')"])
    steps = steps_of(run, "plain", count=6, micro_batches=3)
    assert [active_of(run, "badam")[0] for _ in steps] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("family", "first", "last"),
    [
        ("llama", {"model.embed_tokens.weight"}, {"model.norm.weight", "lm_head.weight"}),
        (
            "gpt2",
            {"transformer.wte.weight", "transformer.wpe.weight"},  # the first is the head, too
            {"transformer.ln_f.weight", "transformer.ln_f.bias"},
        ),
        ("plain", {"embedding.weight"}, {"head.weight", "head.bias"}),
    ],
)
def test_embeddings_and_head_are_blocks_of_their_own(
    family: str, first: set[str], last: set[str]
) -> None:
    model = model_of(family)
    run = memrt.prepare(model, ["badam(every=1, order='ascending', embeddings=True, head=True)"])
    found = [trainable(model) for _ in steps_of(run, family, count=LAYERS + 2)]
    layers = [names_of(model, family, [index]) for index in range(LAYERS)]
    assert found == [first, *layers, last]
    assert set().union(*found) == {name for name, _ in model.named_parameters()}


def test_a_head_can_train_in_every_turn() -> None:
    """The reference: one AdamW for each block, made anew at its turn, and one for the head."""
    model, plain = model_of("plain"), model_of("plain")
    options = {"lr": 1e-2, "weight_decay": 0.1}
    run = memrt.prepare(model, ["badam(every=2, order='descending', head='always')"], **options)
    head = torch.optim.AdamW(plain.head.parameters(), fused=True, **options)
    for step in steps_of(run, "plain", count=12):
        names = names_of(plain, "plain", active_of(run, "badam"))
        assert trainable(model) == {*names, "head.weight", "head.bias"}
        if step % 2 == 0:
            parameters = [p for name, p in plain.named_parameters() if name in names]
            block = torch.optim.AdamW(parameters, fused=True, **options)
        torch.manual_seed(500 + step)
        model_loss(plain, batch_of("plain", seed=10 * step)).backward()
        block.step()
        head.step()
        plain.zero_grad()
        assert_equal(weights(model), weights(plain))
        assert run.optimizer is not None
        assert state_bytes(run.optimizer) == ideal_bytes(model, trainable(model))


def test_a_new_head_that_stays_as_it_is_gets_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config("bert")
    for spec, warned in [("badam", True), ("badam(head='always')", False), ("badam(head=True)", 0)]:
        caplog.clear()
        memrt.prepare(AutoModelForSequenceClassification.from_config(config), [spec])
        assert ("a new head should train: badam(head='always')" in caplog.text) == warned
    memrt.prepare(model_of("llama"), ["badam"])  # its head was trained with it
    assert not caplog.text


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize("family", ["plain", "gpt2"])
def test_in_a_turn_its_block_alone_changes(family: str) -> None:
    """Weight decay included: what is frozen keeps its bits, embeddings and head for ever."""
    model = model_of(family)
    run = memrt.prepare(model, ["badam(every=2)"], lr=1e-2, weight_decay=0.5)
    for turn in range(8):
        before = weights(model)
        train(run, family, first=2 * turn, count=2)
        after = weights(model)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == names_of(model, family, active_of(run, "badam"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trainer_decays_matrices_by_exactly_the_rate_and_vectors_not_at_all(
    family: str, tmp_path: Path
) -> None:
    """A loss of zero has gradients of zero, with which AdamW does nothing but decay."""

    class Idle(memrt.Trainer):
        def compute_loss(self, *given: Any, **options: Any) -> Any:
            return super().compute_loss(*given, **options) * 0.0

    trainer = trainer_of(
        tmp_path,
        family=family,
        cls=Idle,
        options={"strategies": ["badam(every=2, order='ascending')"]},
        max_steps=2,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        weight_decay=0.25,
    )
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    in_turn = names_of(trainer.model, family, [0])
    assert {before[name].ndim for name in in_turn} == {1, 2}
    for name, weight in before.items():
        decays = name in in_turn and weight.ndim > 1
        expected = weight * (1 - 0.5 * 0.25) ** 2 if decays else weight
        rtol = 2 * torch.finfo(torch.float32).eps if decays else 0.0
        torch.testing.assert_close(after[name], expected, rtol=rtol, atol=0.0, msg=name)


def test_with_one_block_it_is_adamw_bit_for_bit() -> None:
    plain, model = model_of("llama", layers=1), model_of("llama", layers=1)
    block = [p for name, p in plain.named_parameters() if ".layers." in name]
    optimizer = torch.optim.AdamW(block, lr=1e-2, weight_decay=0.1, fused=True)
    run = memrt.prepare(model, ["badam(every=2)"], lr=1e-2, weight_decay=0.1)
    for step in steps_of(run, "llama", count=7):
        torch.manual_seed(500 + step)
        model_loss(plain, batch_of("llama", seed=10 * step)).backward()
        optimizer.step()
        plain.zero_grad()
    assert_equal(weights(model), weights(plain))


@pytest.mark.parametrize("parked", ["no", "host"])
def test_a_block_begins_anew_or_goes_on_where_it_was(parked: str) -> None:
    """The reference: one AdamW for each block, made anew at each turn, or kept."""
    model, plain = model_of("plain"), model_of("plain")
    run = memrt.prepare(
        model, [f"badam(every=2, order='descending', parked={parked!r})"], lr=1e-2, weight_decay=0.1
    )
    kept: dict[int, torch.optim.AdamW] = {}
    for step in steps_of(run, "plain", count=20):
        (block,) = active_of(run, "badam")
        if block not in kept or (parked == "no" and step % 2 == 0):
            names = names_of(plain, "plain", [block])
            parameters = [p for name, p in plain.named_parameters() if name in names]
            kept[block] = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)
        torch.manual_seed(500 + step)
        model_loss(plain, batch_of("plain", seed=10 * step)).backward()
        kept[block].step()
        plain.zero_grad()
        assert_equal(weights(model), weights(plain))
    assert run.optimizer is not None
    counts = {int(state["step"]) for state in states(run.optimizer, model).values()}
    assert counts == ({2} if parked == "no" else {2 * len(range(1, 20, 8))})


@pytest.mark.parametrize(("parked", "head"), [("no", True), ("disk", True), ("host", "always")])
def test_resume_in_the_middle_of_a_turn(parked: str, head: bool | str) -> None:
    spec = f"badam(every=4, parked={parked!r}, head={head!r})"
    whole = memrt.prepare(model_of("gpt2"), [spec], lr=1e-2, weight_decay=0.1)
    train(whole, "gpt2", count=26)
    stopped = memrt.prepare(model_of("gpt2"), [spec], lr=1e-2, weight_decay=0.1)
    train(stopped, "gpt2", count=18)
    buffer = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "run": stopped.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)

    resumed = memrt.prepare(model_of("gpt2", seed=9), [spec], lr=1e-2, weight_decay=0.1)
    train(resumed, "gpt2", count=3)  # of its own, all of which must be forgotten
    resumed.model.load_state_dict(state["model"])
    resumed.load_state_dict(copy.deepcopy(state["run"]))
    assert active_of(resumed, "badam") == active_of(stopped, "badam")
    train(resumed, "gpt2", first=18, count=8)
    assert_equal(weights(resumed.model), weights(whole.model))
    assert resumed.optimizer is not None
    assert whole.optimizer is not None
    assert state_bytes(resumed.optimizer) == state_bytes(whole.optimizer)
    assert state_bytes(resumed.optimizer) == ideal_bytes(resumed.model, trainable(resumed.model))


# ---------------------------------------------------------------- refusals


def test_blocks_without_parameters_are_refused() -> None:
    model = model_of("plain")
    model.embedding.weight.requires_grad_(False)
    model.head.requires_grad_(False)
    with pytest.raises(ConflictError, match=r"embeddings=True: nothing before the layers"):
        memrt.prepare(model, ["badam(embeddings=True)"])
    with pytest.raises(ConflictError, match=r"head=True: nothing after .* tied"):
        memrt.prepare(model, ["badam(head=True)"])
    with pytest.raises(ConflictError, match="no list of repeated layers"):
        memrt.prepare(torch.nn.Linear(4, 4), ["badam"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("badam(every=0)", r"every=0: must be"),
        ("badam(order='up')", r"order='up': use one of random, ascending, descending"),
        ("badam(head=1)", r"head=1: must be True, False or 'always'"),
        ("badam(head='on')", r"head='on': must be True, False or 'always'"),
        ("badam(parked='cpu')", r"parked='cpu': use one of no, host, disk"),
        ("badam(seed=None)", r"seed=None: must be a whole number"),
        ("badam(seed=[1])", r"seed=\[1\]: must be a whole number"),
    ],
)
def test_values_are_checked(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memrt.prepare(model_of("plain"), [spec])
