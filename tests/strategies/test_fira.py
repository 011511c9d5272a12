"""Fira through a session: bytes, bypass, partners. Its equations: tests/optimizers."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import memrt
from memrt import registry
from memrt.errors import ConflictError
from tests.strategies.runs import assert_equal, batch_of, counted, states
from tests.strategies.test_apollo import projections
from tests.strategies.test_galore import backward, build, weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "plain"])
def test_state_bytes_are_the_formula(family: str) -> None:
    """4 m r for the basis, 8 n r for the moments and 4 for a norm."""
    model = build(family)
    run = memrt.prepare(model, ["fira(rank=4)"])
    for step in range(2):
        backward(run, family, seed=step)
        run.step()
    assert run.optimizer is not None
    found, expected = states(run.optimizer, model), 0
    for name, parameter in model.named_parameters():
        own = sum(t.numel() * t.element_size() for t in found[name].values())
        inside = name in projections(run, "fira")
        assert own == 8 * (max(parameter.shape) * 4 if inside else parameter.numel()) + 4
        expected += own + (4 * min(parameter.shape) * 4 + 4 if inside else 0)
    run.detach()
    timeline = counted(build(family), ["fira(rank=4)"], [batch_of(family)])
    assert timeline.account_maxima()["optimizer"] == expected


def test_in_backward_changes_no_bit() -> None:
    trained = []
    for extra in ([], ["in_backward"]):
        run = memrt.prepare(build("llama"), ["fira(rank=4, every=3)", *extra], lr=1e-2)
        for step in range(4):
            backward(run, "llama", seed=step)
            run.step()
        trained.append(weights(run.model))
    assert_equal(*trained)


def test_a_rank_that_is_not_below_the_smaller_side_is_adamw_bit_for_bit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    with caplog.at_level(logging.WARNING):
        run = memrt.prepare(build("llama"), ["fira(rank=32)"], **options)
    assert "fira: rank=32 is not below the smaller side of 28 weights" in caplog.text
    other = memrt.prepare(build("llama"), **options)
    for step in range(3):
        for each in (run, other):
            backward(each, "llama", seed=step)
            each.step()
    assert_equal(weights(run.model), weights(other.model))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fira(rank=0)", "rank=0: must be a whole number"),
        ("fira(residual_scale=0)", "residual_scale=0: must be a number above 0"),
        ("fira(growth=0.9)", r"growth=0\.9: must be a number above 1, or None"),
        ("fira(growth='x')", r"growth='x': must be a number above 1, or None"),
        ("fira(residual_scale=1e999)", "residual_scale=inf: must be a number above 0"),
        ("fira(residual_scale=True)", "residual_scale=True: must be a number above 0"),
        ("fira(seed=1)", "strategy 'fira' has no option 'seed'"),
    ],
)
def test_wrong_settings_are_named(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        registry.parse(spec)


def test_two_projections_of_a_weight_are_refused() -> None:
    with pytest.raises(ConflictError, match="apollo_mini and fira both own the projection of"):
        memrt.prepare(build("plain"), ["fira(rank=4)", "apollo_mini"])
    # of other weights they go together
    run = memrt.prepare(
        build("llama"), ["fira(rank=4, targets='mlp')", "apollo_mini(targets='attention')"]
    )
    backward(run, "llama")
    run.step()
