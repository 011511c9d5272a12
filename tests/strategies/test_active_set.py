"""What LISA and BAdam have in common: bytes of what trains, and a backward that stops below it."""

from __future__ import annotations

import pytest

import memrt
from memrt.errors import ConflictError
from memrt.profiling.ledger import Ledger
from memrt.runner import model_loss
from tests.strategies.active_runs import (
    LAYERS,
    OUTSIDE,
    active_of,
    ideal_bytes,
    names_of,
    state_bytes,
    steps_of,
    trainable,
)
from tests.strategies.runs import assert_equal, batch_of, gradients, held_for_backward, model_of

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
