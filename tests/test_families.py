"""Every family: every strategy trains it or refuses it by name, and plans equal the ledger.

The four families of every test are held to this by the contract and by `test_planning.py`.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from memrt import registry
from memrt.loading import load
from memrt.planning import Shape, batches_of, plan, simulate
from memrt.profiling.ledger import Ledger
from memrt.runner import copied, start, train_step
from memrt.strategy import Strategy
from memrt.structure import RunSettings
from memrt.testing import tiny_batches, tiny_config, tiny_model
from tests.contract import STACKS, advance, begin, refusal, specs, tensors_equal, train
from tests.families import NEW_STRUCTURE, OTHER_FAMILIES

_EXPERTS = r"PEFT cannot put LORA into \w+: .*ParamWrapper"
REASONS: dict[str, tuple[str, ...]] = {
    "vit": (r"ViTForImageClassification has no language-model head",),
    "mixtral": (_EXPERTS,),
    "deepseek_v3": (_EXPERTS,),
}
"""Why a strategy cannot serve a family; every other family is served by all strategies."""

PLANNED: dict[str, tuple[list[str], torch.dtype]] = {
    "none": ([], torch.bfloat16),
    "states and recomputation": (
        ["galore", "int8_states", "activation_checkpoint", "fused_loss"],
        torch.float32,
    ),
    "places and active set": (["offload_activations", "lisa"], torch.float32),
}
"""Three stacks that reach every account between them."""

CASES = [
    pytest.param(
        family,
        planned,
        marks=[pytest.mark.slow]
        if planned == "places and active set" and family not in NEW_STRUCTURE
        else [],
    )
    for family in OTHER_FAMILIES
    for planned in PLANNED
]


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_every_strategy_trains_a_family_or_refuses_it_by_name(family: str) -> None:
    """Two steps; exact strategies change no bit; detached, the model's classes are its own."""
    plain = train(family, [], steps=2)
    classes = {name: type(module) for name, module in plain.model.named_modules()}
    met = set()
    for name in registry.names():
        reason = refusal(family, [name])
        if reason is not None:
            found = [known for known in REASONS.get(family, ()) if re.search(known, reason)]
            assert found, reason
            assert f"- {name}: " in reason or "- peft: " in reason
            met.update(found)
            continue
        outcome = begin(family, [name])
        before = outcome.weights()
        advance(outcome, family, steps=2)
        after = outcome.weights()
        assert not tensors_equal(before, after), name
        assert all(torch.isfinite(tensor).all() for tensor in after.values()), name
        if registry.parse(name).exact:
            assert outcome.losses == plain.losses, name
            assert tensors_equal(after, plain.weights()), name
        outcome.session.detach()
        assert {n: type(m) for n, m in outcome.model.named_modules()} == classes, name
    assert met == set(REASONS.get(family, ())), "a reason that no strategy gives any more"


def _strategies(family: str, stack: list[str]) -> list[Strategy]:
    """The strategies of a stack that serve a family."""
    return registry.parse_all(specs([name for name in stack if refusal(family, [name]) is None]))


def _assert_plan_equals_ledger(family: str, stack: list[str], dtype: torch.dtype) -> None:
    strategies = _strategies(family, stack)
    settings = RunSettings(max_grad_norm=1.0)
    window = tiny_batches(family, count=1)

    def build() -> torch.nn.Module:
        return load(tiny_config(family, layers=2), dtype=dtype)  # as `memrt.plan` does

    planned = simulate(build, strategies, window, settings=settings)
    torch.manual_seed(0)
    model, ledger = tiny_model(family, dtype=dtype, layers=2), Ledger()
    windows = [copied(window) for _ in range(2)]
    with ledger:
        run = start(model, strategies, settings=settings, ledger=ledger)
        while windows:
            train_step(run, windows.pop())
    ledger.close()
    counted = ledger.timeline.peak()
    assert planned.peak.peak_bytes == counted.peak_bytes
    assert planned.peak.accounts == counted.accounts
    assert planned.peak.owners == counted.owners
    assert planned.peak.places == counted.places
    assert planned.phases() == ledger.timeline.phase_peaks()
    assert planned.account_maxima == ledger.timeline.account_maxima()


@pytest.mark.parametrize(("family", "planned"), CASES)
def test_plan_equals_the_ledger(family: str, planned: str) -> None:
    _assert_plan_equals_ledger(family, *PLANNED[planned])


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_every_plan_equals_the_ledger(family: str) -> None:
    """Every strategy alone, and every committed stack that the family can be trained with."""
    cases = [([name], torch.float32) for name in registry.names()]
    for stack, dtype in [*cases, *((stack, torch.bfloat16) for stack in STACKS)]:
        if refusal(family, stack) is None:
            _assert_plan_equals_ledger(family, stack, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_committed_stacks_train_every_family(family: str) -> None:
    for stack in STACKS:
        if refusal(family, stack) is None:
            outcome = train(family, stack, steps=2)
            assert all(torch.isfinite(t).all() for t in outcome.weights().values()), stack


@pytest.mark.parametrize("family", ["t5", "phi", "gemma2"])
def test_the_fused_head_gives_the_loss_and_gradients_of_the_models_own(family: str) -> None:
    """A loss computed in the forward over a decoder's labels; a head with a bias; a soft cap."""
    torch.manual_seed(0)
    plain = tiny_model(family, dtype=torch.float64).eval()
    fused = begin(family, ["fused_loss"])
    fused.model.to(torch.float64).load_state_dict(plain.state_dict())
    batch = tiny_batches(family)[0]
    expected = plain(**batch)
    expected.loss.backward()
    for module in fused.model.modules():  # dropout off, and the head door open
        module.training = module is fused.model
    with fused.session.micro_batch():
        observed = fused.model(**batch)
        fused.session.backward(observed.loss)
    assert observed.logits is None
    assert type(observed) is type(expected)
    assert float(observed.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-6)
    gradients = dict(plain.named_parameters())
    for name, parameter in fused.model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-7, msg=name
        )


@pytest.mark.parametrize("family", ["vit", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_layers_of_other_families_are_carried_to_full_depth(family: str) -> None:
    """Images; a first layer unlike the others."""
    options = {"batch_size": 2, "sequence_length": 16}
    found = plan(tiny_config(family, layers=7), **options)
    whole = plan(tiny_config(family, layers=7), full=True, **options)
    assert found.simulated_layers == (4, 5, 6)
    assert whole.simulated_layers == (7,)
    assert found.simulation.peak.accounts == whole.simulation.peak.accounts
    assert found.simulation.phases() == whole.simulation.phases()


@pytest.mark.parametrize("family", ["gemma2", pytest.param("t5", marks=pytest.mark.slow)])
def test_unlike_layers_are_all_run(family: str) -> None:
    """Windows in every other layer; an encoder and a decoder."""
    found = plan(tiny_config(family, layers=7), batch_size=1, sequence_length=8)
    assert found.simulated_layers == (7,)


def test_a_model_of_neither_text_nor_images_needs_its_batches() -> None:
    config = SimpleNamespace(model_type="wav2vec2", num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"'wav2vec2' takes neither text nor images; pass window"):
        batches_of(config, Shape())
