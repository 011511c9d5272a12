"""The contract: every registered strategy on every family."""

from __future__ import annotations

import io

import pytest
import torch

from memrt import registry
from memrt.profiling.accounts import Account
from memrt.runner import model_loss
from memrt.testing import tiny_batches, tiny_model
from tests.contract import (
    FAMILIES,
    PARTNERS,
    ROUNDED,
    SPECS,
    advance,
    begin,
    refusal,
    session_state,
    specs,
    tensors_equal,
    train,
)
from tests.families import contract_cases

CASES = contract_cases(registry.names())


@pytest.fixture(autouse=True)
def _served(request: pytest.FixtureRequest) -> None:
    """Skip the families that a strategy refuses, showing its reason."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if "name" in params and "family" in params:
        reason = refusal(params["family"], [params["name"]])
        if reason is not None:
            pytest.skip(f"refused: {reason}")


def test_every_strategy_has_a_contract_spec() -> None:
    assert set(SPECS) == set(registry.names())


def test_the_only_refused_families_are_those_without_a_head() -> None:
    cases = [(name, family) for name in registry.names() for family in FAMILIES]
    refused = {(name, family) for name, family in cases if refusal(family, [name])}
    assert refused == {("fused_loss", "plain")}


@pytest.mark.parametrize(("name", "family"), CASES)
def test_trains_and_is_deterministic(name: str, family: str) -> None:
    one = train(family, [name], steps=6)
    other = train(family, [name], steps=6)
    assert one.losses == other.losses
    assert tensors_equal(one.weights(), other.weights())
    assert all(torch.isfinite(t).all() for t in one.weights().values())
    again = advance(one, family, steps=1).losses[-2:]  # the first step's batches
    if family in FAMILIES:
        assert sum(again) < sum(one.losses[:2])
    else:  # six steps of a side network that begins at random are too few on some families
        assert again != one.losses[:2]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_resume_equals_the_uninterrupted_run(name: str, family: str) -> None:
    """Stopped after 3 of 6 steps: in the middle of every interval of the specs."""
    whole = train(family, [name], steps=6)
    stopped = train(family, [name], steps=3)
    buffer = io.BytesIO()
    torch.save(session_state(stopped), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)

    torch.manual_seed(99)  # nothing may depend on how the fresh model was made
    resumed = begin(family, [name])
    resumed.model.load_state_dict(state["model"])
    resumed.session.load_state_dict(state["run"])
    advance(resumed, family, steps=3, first=3)
    assert resumed.losses == whole.losses[6:]
    assert tensors_equal(resumed.weights(), whole.weights())


@pytest.mark.parametrize(("name", "family"), CASES)
def test_detach_leaves_the_model_as_it_was_found(name: str, family: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(family)
    next(model.parameters()).requires_grad_(False)
    classes = {n: type(m) for n, m in model.named_modules()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    state = {k: v.clone() for k, v in model.state_dict().items()}

    session = _prepare(model, name)
    session.begin_step()
    session.detach()

    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert {
        n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()
    } == hooks
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
    found = dict(model.state_dict())
    if name in ROUNDED:
        assert found.keys() == state.keys()
        for key, tensor in state.items():  # NF4: half of its widest step, and its scale's rounding
            assert found[key].dtype == tensor.dtype
            assert (found[key] - tensor).abs().max() <= 0.2 * tensor.abs().max()
        state = found
    assert tensors_equal(found, state)


def _prepare(model: torch.nn.Module, name: str):  # type: ignore[no-untyped-def]
    import memrt

    return memrt.prepare(model, specs([name]))


@pytest.mark.parametrize(("name", "family"), CASES)
def test_evaluation_is_untouched(name: str, family: str) -> None:
    outcome = begin(family, [name])
    batch = tiny_batches(family, count=1, seed=7)[0]
    outcome.session.begin_step()
    outcome.model.eval()
    with torch.no_grad():
        observed = outcome.model(**batch)
    torch.manual_seed(0)
    plain = tiny_model(family).eval()
    if name in ROUNDED:
        outcome.session.detach()
        plain = outcome.model
    with torch.no_grad():
        expected = plain(**batch)
    key = "logits" if "logits" in expected else "loss"
    assert torch.equal(observed[key], expected[key])


@pytest.mark.parametrize(("name", "family"), CASES)
def test_exact_strategies_change_no_bit(name: str, family: str) -> None:
    if not registry.parse(name).exact:
        pytest.skip(f"{name} does not claim to be exact")
    plain, observed = train(family, PARTNERS.get(name, [])), train(family, [name])
    assert observed.losses == plain.losses
    assert tensors_equal(observed.weights(), plain.weights())


@pytest.mark.parametrize(("name", "family"), CASES)
def test_lowers_the_accounts_that_it_claims(name: str, family: str) -> None:
    """In the ledger of a run; workspace is compared where logits live, at the head."""
    overrides = _large_enough(name)
    plain = _accounts(family, PARTNERS.get(name, []), overrides)
    lowered = _accounts(family, [name], overrides)
    for account in registry.parse(name).lowers:
        assert lowered[account.value] < plain[account.value], account


def _large_enough(name: str) -> dict[str, int]:
    return {"hidden": 64} if name == "ladder" or name.endswith("_states") else {}


def _accounts(family: str, names: list[str], overrides: dict[str, int]) -> dict[str, int]:
    from memrt.profiling.ledger import Ledger
    from memrt.runner import start, train_step
    from memrt.structure import RunSettings

    torch.manual_seed(0)
    model = tiny_model(family, **overrides)
    ledger = Ledger()
    with ledger:
        run = start(model, registry.parse_all(specs(names)), settings=RunSettings(), ledger=ledger)
        for step in range(2):
            train_step(run, tiny_batches(family, count=1, seed=step, length=32))
    ledger.close()
    accounts = dict(ledger.timeline.account_maxima())
    if Account.WORKSPACE in registry.parse(names[0] if names else "fused_loss").lowers:
        accounts["workspace"] = ledger.timeline.peak(
            where=lambda region: region.phase in ("forward", "backward") and not region.module
        ).accounts["workspace"]
    return accounts


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "plain"])
def test_loss_with_labels_is_the_models_own(family: str) -> None:
    """The head door gives the loss that the model would have given."""
    torch.manual_seed(0)
    plain = tiny_model(family).train()
    torch.manual_seed(0)
    fused = begin(family, ["fused_loss"])
    for seed in range(3):
        batch = tiny_batches(family, count=1, seed=seed)[0]
        torch.manual_seed(5)
        expected = model_loss(plain, batch)
        torch.manual_seed(5)
        with fused.session.micro_batch():
            observed = model_loss(fused.model, batch)
        assert float(observed.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
