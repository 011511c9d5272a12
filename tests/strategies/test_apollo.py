"""APOLLO and APOLLO-Mini through a session: bytes, AdamW where they step aside, and partners."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import memrt
from memrt import registry
from memrt.errors import ConflictError
from memrt.session import Session
from memrt.structure import RunSettings
from tests.strategies.runs import assert_equal, batch_of, counted, states
from tests.strategies.test_galore import backward, build, weights

NAMES = ["apollo", "apollo_mini"]
SPECS = {"apollo": "apollo(rank=4, every=3)", "apollo_mini": "apollo_mini(every=3)"}


def projections(run: Session, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(  # type: ignore[attr-defined]
        attachment for attachment in run.attachments if attachment.name == name
    ).subspaces
    return found


def test_the_papers_values_are_the_defaults() -> None:
    apollo, mini = registry.parse("apollo"), registry.parse("apollo_mini")
    values = {"every": 200, "growth": 1.01, "targets": "all"}
    for strategy, own in (
        (apollo, {"rank": 256, "scale": 1.0, "granularity": "channel"}),
        (mini, {"rank": 1, "scale": 128.0, "granularity": "tensor"}),
    ):
        found = strategy.to_json()
        assert {key: found[key] for key in (values | own)} == values | own


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_are_the_formula(name: str, family: str) -> None:
    """8 n r for the moments and 4 for a norm: nothing of the random matrix is kept."""
    model = build(family)
    run = memrt.prepare(model, [SPECS[name]])
    for step in range(2):
        backward(run, family, seed=step)
        run.step()
    assert run.optimizer is not None
    found, expected = states(run.optimizer, model), 0
    for weight, parameter in model.named_parameters():
        own = sum(t.numel() * t.element_size() for t in found[weight].values())
        inside = weight in projections(run, name)
        rank = 4 if name == "apollo" else 1
        assert own == 8 * (max(parameter.shape) * rank if inside else parameter.numel()) + 4
        expected += own + 4 * inside
    run.detach()
    timeline = counted(build(family), [SPECS[name]], [batch_of(family)])
    assert timeline.account_maxima()["optimizer"] == expected


def test_in_backward_one_gradient_is_alive_at_a_time() -> None:
    """And the weights are those of a step after backward, to the bit."""
    found, trained = [], []
    for extra in ([], ["in_backward"]):
        model = build("llama")
        run = memrt.prepare(model, [SPECS["apollo"], *extra], lr=1e-2)
        for step in range(4):
            backward(run, "llama", seed=step)
            run.step()
        trained.append(weights(model))
        run.detach()
        timeline = counted(build("llama"), [SPECS["apollo"], *extra], [batch_of("llama")])
        found.append(timeline.account_maxima()["gradients"])
    assert_equal(*trained)
    assert found[1] < found[0] / 8


def test_a_rank_that_is_not_below_the_smaller_side_is_adamw_bit_for_bit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    model, plain = build("llama"), build("llama")
    with caplog.at_level(logging.WARNING):
        run = memrt.prepare(model, ["apollo(rank=32)"], **options)
    assert caplog.messages == [
        "apollo: rank=32 is not below the smaller side of 28 weights; they keep AdamW"
    ]
    other = memrt.prepare(plain, **options)
    for step in range(3):
        for each in (run, other):
            backward(each, "llama", seed=step)
            each.step()
    assert_equal(weights(model), weights(plain))


def test_draws_are_staggered() -> None:
    run = memrt.prepare(build("plain"), ["apollo(rank=4, every=4)"])
    counts = []
    for step in range(5):
        backward(run, "plain", seed=step)
        run.step()
        counts.append([p.draw_count for p in projections(run, "apollo").values()])
    assert counts[0] == [1] * 8
    assert counts[4] == [2] * 8
    assert counts[2] == [1, 1, 2, 2, 2, 2, 1, 1]


def test_what_does_not_go_together_is_refused_by_name() -> None:
    for stack, words in (
        (["apollo", "galore"], "apollo and galore both own the projection of|galore breaks"),
        (["apollo(rank=4)", "galore(rank=4)"], "apollo and galore both own the projection of"),
        (["apollo(rank=4)", "galore(rank=4)"], "apollo needs that a weight's full gradient exists"),
        (["apollo_mini", "galore(rank=4)"], "apollo_mini and galore both own the projection"),
        (["apollo(targets='attention')"], "apollo: targets='attention' matches no trainable"),
    ):
        with pytest.raises(ConflictError, match=words):
            memrt.prepare(build("plain"), stack)
    # the gradient is formed: fp16's scaler and sharding may have it
    strategies = registry.parse_all([SPECS["apollo"]])
    Session(build("plain"), strategies, settings=RunSettings(fp16=True)).detach()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("apollo(rank=0)", "rank=0: must be a whole number"),
        ("apollo(every=0)", "every=0: must be a whole number"),
        ("apollo(scale=0)", "scale=0: must be a number above 0"),
        ("apollo(granularity='row')", "granularity='row': use one of channel, tensor"),
        ("apollo(growth=1.0)", r"growth=1\.0: must be a number above 1, or None"),
        ("apollo(growth='x')", r"growth='x': must be a number above 1, or None"),
        ("apollo(seed='a')", "seed='a': must be a whole number"),
        ("apollo_mini(seed=1.5)", r"seed=1\.5: must be a whole number"),
        ("apollo(targets='embeddings')", "targets='embeddings': use one of all"),
    ],
)
def test_wrong_settings_are_named(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        registry.parse(spec)


def test_without_a_limit_nothing_is_kept_beside_the_moments() -> None:
    run = memrt.prepare(build("plain"), ["apollo(rank=4, growth=None)"])
    backward(run, "plain")
    run.step()
    assert [p.tensors() for p in projections(run, "apollo").values()] == [{}] * 8
    assert all(bool(torch.isfinite(w).all()) for w in weights(run.model).values())
