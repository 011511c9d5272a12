"""Bases and norms of weights that wait: they lie where the moments lie, and come back with them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import memrt
from memrt.profiling.accounts import Account, Place
from memrt.profiling.ledger import Ledger
from memrt.session import Session
from memrt.testing import PlainModel, tiny_batches
from tests.strategies.active_runs import (
    active_of,
    names_of,
    state_bytes,
    steps_of,
    train,
    weights,
)
from tests.strategies.runs import assert_equal, model_of

BADAM = "badam(every=2, order='ascending', parked={parked!r})"
PROJECTIONS = {
    "galore": "galore(rank=4, every=5)",
    "plain": "galore(rank=4, every=5, form='plain')",
    "int4": "q_galore(rank=4, every=1, lazy=0.1)",  # with overlaps, and 8-bit states
    "fira": "fira(rank=4, every=5)",
    "apollo": "apollo(rank=4, every=5)",
}
CASES = [*((kind, "host") for kind in PROJECTIONS), ("int4", "disk")]


def _prepared(kind: str, parked: str, *, seed: int = 0, ledger: Ledger | None = None) -> Session:
    stack = [BADAM.format(parked=parked), PROJECTIONS[kind]]
    return memrt.prepare(model_of("plain", seed=seed), stack, lr=1e-2, ledger=ledger)


def _held(run: Session, names: set[str] | None = None) -> dict[str, Tensor]:
    """What the projections of these weights keep, of all if None."""
    return {
        f"{name}.{key}": tensor
        for name, subspace in run.attachments[-1].subspaces.items()  # type: ignore[attr-defined]
        if names is None or name in names
        for key, tensor in subspace.tensors().items()
    }


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(("kind", "place"), CASES)
def test_what_a_projection_keeps_lies_where_its_moments_lie(kind: str, place: str) -> None:
    """On the device lies what trains, and nothing of a layer that left."""
    ledger = Ledger()
    with ledger:
        run = _prepared(kind, place, ledger=ledger)
        assert run.optimizer is not None
        for step in steps_of(run, "plain", count=12):
            now = ledger.timeline.now - 1
            on_device = ledger.timeline.breakdown(now, place=Place.DEVICE)
            parked = ledger.timeline.breakdown(now, place=Place(place))
            # only numbers: a tensor that is held here would not leave
            here = _num_bytes(_held(run, names_of(run.model, "plain", active_of(run, "badam"))))
            waiting = _num_bytes(_held(run)) - here
            shared = _num_bytes(
                {str(i): t for i, t in enumerate(run.optimizer.shared_tensors())}  # type: ignore[attr-defined]
            )
            optimizer = Account.OPTIMIZER.value
            expected = state_bytes(run.optimizer) + here + shared
            assert on_device.accounts[optimizer] == expected
            assert on_device.owners[run.attachments[-1].name] == here
            moments = sum(
                _num_bytes(entry["state"]) for entry in run.strategy_state()["parked"].values()
            )
            if step >= 2:
                assert waiting > 0
                assert parked.accounts[optimizer] == waiting + moments


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_the_place_changes_no_bit(kind: str) -> None:
    """The reference keeps every tensor where it is."""
    ends = []
    for place in ("host", "disk", "device"):
        stack = [BADAM.format(parked="host"), PROJECTIONS[kind]]
        run = memrt.prepare(model_of("plain"), stack, lr=1e-2)
        run.attachments[0]._park = place  # type: ignore[attr-defined]
        train(run, "plain", count=21)
        ends.append(weights(run.model))
    assert_equal(ends[0], ends[2])
    assert_equal(ends[1], ends[2])


@pytest.mark.parametrize(("kind", "place"), CASES)
def test_a_basis_comes_back_as_it_left(kind: str, place: str) -> None:
    run = _prepared(kind, place)
    train(run, "plain", count=2)
    layer = names_of(run.model, "plain", [0])
    left = {name: tensor.clone() for name, tensor in _held(run, layer).items()}
    assert left
    train(run, "plain", first=2, count=6)
    assert_equal(_held(run, layer), left)
    run.begin_step()
    assert active_of(run, "badam") == [0]
    assert_equal(_held(run, layer), left)


@pytest.mark.parametrize(("kind", "place"), CASES)
def test_resume_with_parked_bases_in_the_middle_of_an_interval(kind: str, place: str) -> None:
    whole = _prepared(kind, place)
    train(whole, "plain", count=24)
    stopped = _prepared(kind, place)
    train(stopped, "plain", count=11)
    buffer = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "run": stopped.state_dict()}, buffer)
    buffer.seek(0)
    state: dict[str, Any] = torch.load(buffer, weights_only=True)

    ledger = Ledger()
    with ledger:
        resumed = _prepared(kind, place, seed=9, ledger=ledger)
        train(resumed, "plain", count=3)  # of its own, all of which must be forgotten
        resumed.model.load_state_dict(state["model"])
        resumed.load_state_dict(copy.deepcopy(state["run"]))
        with resumed.micro_batch(last=False):  # books what was loaded
            pass
        names = names_of(resumed.model, "plain", active_of(resumed, "badam"))
        now = ledger.timeline.now - 1
        owned = ledger.timeline.breakdown(now, place=Place.DEVICE).owners
        assert owned[resumed.attachments[-1].name] == _num_bytes(_held(resumed, names))
        train(resumed, "plain", first=11, count=13)
    assert_equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("kind", ["galore", "fira"])
def test_the_same_moves_are_planned(kind: str) -> None:
    """Fake tensors lie where real ones do, and as many bytes are on the way."""
    found = []
    for mode in (None, FakeTensorMode()):
        ledger = Ledger()
        with ledger:
            if mode is None:
                _run_of(kind, ledger)
            else:
                with mode:
                    _run_of(kind, ledger)
        peak = ledger.timeline.peak()
        found.append((peak.peak_bytes, peak.accounts, peak.owners, peak.places, ledger.moved))
    assert found[0] == found[1]
    assert any("host to device" in key[1] for key in found[0][4])


def _run_of(kind: str, ledger: Ledger) -> None:
    model = PlainModel()
    stack = ["badam(every=1, order='ascending', parked='host')", PROJECTIONS[kind]]
    run = memrt.prepare(model, stack, ledger=ledger)
    for index in range(6):
        with run.micro_batch():
            run.backward(model(**tiny_batches("plain", seed=index)[0])["loss"])
        run.step()
