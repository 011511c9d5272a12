"""What LISA and BAdam have in common: bytes of what trains, and a backward that stops below it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memrt
from memrt.errors import ConflictError
from memrt.optimizers.adamw import AdamW
from memrt.profiling.ledger import Ledger
from memrt.registry import parse_all
from memrt.runner import model_loss, start
from memrt.structure import RunSettings
from memrt.testing import tiny_batches
from tests.strategies.active_runs import (
    LAYERS,
    OUTSIDE,
    active_of,
    ideal_bytes,
    names_of,
    state_bytes,
    steps_of,
    train,
    trainable,
    weights,
)
from tests.strategies.runs import (
    assert_equal,
    assert_planned,
    batch_of,
    gradients,
    held_for_backward,
    model_of,
    states,
)

SPECS = {
    "lisa": "lisa(layers=1, every=3, parked={parked!r})",
    "badam": "badam(every=3, parked={parked!r})",
}


@pytest.mark.parametrize("parked", ["no", "host"])
@pytest.mark.parametrize("name", SPECS)
def test_over_300_steps_the_state_is_never_more_than_what_trains(name: str, parked: str) -> None:
    """Peers never free it: after a round they hold the state of every layer."""
    model = model_of("plain")
    run = memrt.prepare(model, [SPECS[name].format(parked=parked)])
    assert run.optimizer is not None
    outside = OUTSIDE["plain"] if name == "lisa" else set()
    ever: set[int] = set()
    for _ in steps_of(run, "plain", count=300):
        active = names_of(model, "plain", active_of(run, name)) | outside
        assert trainable(model) == active
        assert state_bytes(run.optimizer) == ideal_bytes(model, active)
        ever.update(active_of(run, name))
    assert ever == set(range(LAYERS))


def test_a_state_leaves_before_a_parked_one_returns() -> None:
    """No moment of a switch holds the state of more than what trains on the device."""
    model, ledger = model_of("plain"), Ledger()
    with ledger:
        run = memrt.prepare(model, ["badam(every=1, parked='host')"], ledger=ledger)
        train(run, "plain", count=2 * LAYERS)
    ledger.close()
    layers = [ideal_bytes(model, names_of(model, "plain", [i])) for i in range(LAYERS)]
    assert ledger.timeline.account_maxima()["optimizer"] == max(layers)


TRUNCATED = ["lisa(layers=1, embeddings=False, seed={seed})", "badam(seed={seed})"]


def _modules_run_backwards(family: str, spec: str) -> tuple[int, set[str]]:
    """The layer that trains, and every module in whose backward a storage was born."""
    ledger, model = Ledger(), model_of(family)
    with ledger:
        run = memrt.prepare(model, [spec], ledger=ledger)
        with run.micro_batch():
            run.backward(model_loss(model, batch_of(family)))
    ledger.close()
    regions = ledger.timeline.peaks_by(lambda region: region)
    (layer,) = active_of(run, spec.split("(")[0])
    return layer, {region.module for region in regions if region.phase == "backward"}


@pytest.mark.parametrize("family", ["plain", "llama", "gpt2"])
@pytest.mark.parametrize("spec", TRUNCATED)
def test_no_operator_of_backward_runs_below_the_lowest_layer_that_trains(
    spec: str, family: str
) -> None:
    """With what lies before the layers frozen; the layer that trains and those above are run."""
    seen = set()
    for seed in range(6):
        layer, modules = _modules_run_backwards(family, spec.format(seed=seed))
        model = model_of(family)
        of_layer = [
            {n.rpartition(".")[0] for n in names_of(model, family, [i])} for i in range(LAYERS)
        ]
        run_backwards = [
            any(any(m == w or m.startswith(f"{w}.") for w in of_layer[i]) for m in modules)
            for i in range(LAYERS)
        ]
        assert run_backwards == [i >= layer for i in range(LAYERS)]
        assert not any("embed" in m or "wte" in m for m in modules)
        seen.add(layer)
    assert len(seen) > 1


@pytest.mark.parametrize("spec", TRUNCATED)
def test_nothing_is_kept_for_backward_below_the_lowest_layer_that_trains(spec: str) -> None:
    for seed in range(4):
        model = model_of("llama")
        run = memrt.prepare(model, [spec.format(seed=seed)])
        run.begin_step()
        (layer,) = active_of(run, spec.split("(")[0])
        run.detach()
        held = held_for_backward(model, [spec.format(seed=seed)], batch_of("llama"))
        layers = {int(r.module.split(".")[2]) for r in held if ".layers." in r.module}
        assert layers == set(range(layer, LAYERS))


@pytest.mark.parametrize("spec", TRUNCATED)
def test_gradients_are_those_of_the_full_backward(spec: str) -> None:
    plain, model = model_of("llama"), model_of("llama")
    run = memrt.prepare(model, [spec.format(seed=1)])
    with run.micro_batch():
        run.backward(model_loss(model, batch_of("llama")))
    model_loss(plain, batch_of("llama")).backward()
    full, found = gradients(plain), gradients(model)
    assert found.keys() == trainable(model)
    assert_equal(found, {name: full[name] for name in found})


def test_two_that_choose_what_trains_are_refused_by_name() -> None:
    with pytest.raises(ConflictError, match=r"badam.* and lisa.* both own the active set"):
        memrt.prepare(model_of("plain"), ["lisa", "badam"])


# ---------------------------------------------------------------- bf16 weights

ALONE = ["lisa(layers=1, every=2)", "badam(every=2)"]


@pytest.mark.parametrize("spec", ALONE)
def test_bf16_weights_have_fp32_moments(spec: str) -> None:
    """The bytes that the page says, and the bits of the same with updates in backward."""
    found = []
    for stack in ([spec], [spec, "in_backward"]):
        model = model_of("llama", dtype=torch.bfloat16)
        run = memrt.prepare(model, stack, lr=1e-3)
        assert isinstance(run.optimizer, AdamW)
        name = spec.split("(")[0]
        for _ in steps_of(run, "llama", count=5):
            active = names_of(model, "llama", active_of(run, name))
            active |= OUTSIDE["llama"] if name == "lisa" else set()
            assert state_bytes(run.optimizer) == ideal_bytes(model, active)
        found.append(weights(model))
    assert_equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [*ALONE, "lisa(layers=1, every=2, parked='host')"])
def test_a_step_whose_gradients_are_not_finite_is_skipped_and_counted(
    spec: str, dtype: torch.dtype
) -> None:
    model = model_of("llama", dtype=dtype)
    run = memrt.prepare(model, [spec], lr=1e-2)
    train(run, "llama", count=1)
    before, held = weights(model), states(run.optimizer, model)
    with run.micro_batch():
        run.backward(model_loss(model, batch_of("llama")) * float("nan"))
    run.step()
    assert_equal(weights(model), before)
    after = states(run.optimizer, model)
    assert after.keys() == held.keys()
    for name in after:
        assert_equal(after[name], held[name])
    assert run.state_dict()["optimizer"]["num_skipped_steps"] == 1
    train(run, "llama", first=2, count=3)
    assert all(weight.isfinite().all() for weight in weights(model).values())


@pytest.mark.parametrize("spec", ALONE)
def test_an_optimizer_of_the_user_stays(spec: str) -> None:
    model = model_of("llama", dtype=torch.bfloat16)
    own = torch.optim.SGD(model.parameters())
    assert memrt.prepare(model, [spec], optimizer=own).optimizer is own


@pytest.mark.parametrize("spec", ALONE)
def test_the_plan_of_bf16_weights_is_the_ledger(spec: str) -> None:
    assert_planned(
        lambda: model_of("llama", dtype=torch.bfloat16), [spec], tiny_batches("llama", count=1)
    )


@pytest.mark.parametrize("spec", ALONE)
def test_rounding_to_the_nearest_is_refused_where_nothing_is_rounded(spec: str) -> None:
    with pytest.raises(ValueError, match=r"no effect: no parameter that trains is bf16"):
        memrt.prepare(model_of("llama"), [spec], stochastic_rounding=False)
    settings = RunSettings(stochastic_rounding=False, optimizer="adafactor")
    with pytest.raises(ValueError, match="no effect with optimizer='adafactor'"):
        start(model_of("llama", dtype=torch.bfloat16), parse_all([spec]), settings=settings)
    run = memrt.prepare(model_of("llama", dtype=torch.bfloat16), [spec], stochastic_rounding=False)
    assert run.optimizer is not None
    assert run.optimizer.param_groups[0]["stochastic_rounding"] is False


def test_every_element_of_a_block_goes_its_own_way() -> None:
    """Updates of a fraction of bf16's spacing, in turns of one step whose state is freed."""
    model = model_of("plain", dtype=torch.bfloat16)
    layers = [p for name, p in model.named_parameters() if name.startswith("layers.")]
    for parameter in layers:
        nn.init.constant_(parameter, 1.5)
    rate, num_turns, unit = 2e-3, 60, 2**-7
    run = memrt.prepare(model, ["badam(every=1)", "in_backward"], lr=rate, betas=(0.0, 0.0))
    for _ in range(num_turns * LAYERS):
        with run.micro_batch():
            run.backward(-sum(parameter.float().sum() for parameter in model.parameters()))
        run.step()
    moved = torch.cat([parameter.detach().double().flatten() - 1.5 for parameter in layers])
    spread = unit * (num_turns * rate / unit * (1 - rate / unit)) ** 0.5
    assert abs(float(moved.mean()) - num_turns * rate) < 5 * spread / moved.numel() ** 0.5
    assert abs(float(moved.std()) / spread - 1) < 5 / (2 * moved.numel()) ** 0.5
    assert moved.all()
