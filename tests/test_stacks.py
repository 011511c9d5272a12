"""Pairs train or are refused with both names; the committed stacks train."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import memrt
from memrt import registry
from memrt.errors import ConflictError
from tests.contract import FAMILIES, PARTNERS, STACKS, refusal, specs, tensors_equal, train

PAIRS = list(combinations(registry.names(), 2))
QUICK = "llama"
"""The family of every pair in the ordinary run; the others follow nightly."""


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != QUICK)) for name in FAMILIES],
)
def test_a_pair_trains_or_names_its_conflict(family: str, pair: tuple[str, str]) -> None:
    reason = refusal(family, pair)
    if reason is None:
        outcome = train(family, pair, steps=2)
        assert all(torch.isfinite(t).all() for t in outcome.weights().values())
        return
    alone = [name for name in pair if refusal(family, [name]) is not None]
    for name in alone or pair:  # by its name, or by its partner's
        assert any(party in reason for party in (name, *PARTNERS.get(name, [])))
    with pytest.raises(ConflictError):
        train(family, pair, steps=1)


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_committed_stacks_train(family: str, stack: list[str]) -> None:
    with_head = [] if family == "plain" else ["fused_loss"]
    outcome = train(family, [*stack, *with_head], steps=6)
    assert sum(outcome.losses[-2:]) < sum(outcome.losses[:2])


def test_the_order_that_the_user_writes_does_not_matter() -> None:
    stack = ["fused_loss", "activation_checkpoint", "int8_states", "lisa"]
    one, other = train("llama", stack), train("llama", stack[::-1])
    assert one.losses == other.losses
    assert tensors_equal(one.weights(), other.weights())


def test_a_refused_stack_touches_nothing() -> None:
    from memrt.testing import tiny_model

    model = tiny_model("plain")
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ConflictError, match="fused_loss"):
        memrt.prepare(model, specs(["activation_checkpoint", "fused_loss"]))
    assert [type(m) for m in model.modules()] == classes


def test_a_second_session_on_one_model_is_refused_until_the_first_is_detached() -> None:
    from memrt.testing import tiny_model

    model = tiny_model("plain")
    first = memrt.prepare(model, specs(["lisa"]))
    first.begin_step()
    with pytest.raises(ValueError, match=r"already carries lisa .* detach"):
        memrt.prepare(model, specs(["activation_checkpoint"]))
    memrt.prepare(model)  # without strategies nothing is put on top
    first.detach()
    memrt.prepare(model, specs(["activation_checkpoint"]))
    assert all(parameter.requires_grad for parameter in model.parameters())
