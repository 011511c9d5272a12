"""Loading a state into a run that goes on: nothing of the step that was open may count."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import memrt
from memrt.errors import NonFiniteGradientError
from memrt.runner import model_loss
from memrt.session import Session
from memrt.strategy import Attachment, Strategy
from memrt.testing import PlainModel
from tests.strategies.active_runs import train, weights
from tests.strategies.runs import assert_equal, batch_of, model_of

ONE_PASS = [["lomo"], ["adalomo"]]
"""These have no window of several micro-batches."""
STACKS = [
    [],
    ["lomo(clip='two_pass')"],
    ["adalomo(clip='two_pass')"],
    ["in_backward"],
    ["in_backward(clip='two_pass')"],
    ["galore(rank=4, every=2)"],
    ["galore(rank=4, form='plain', every=2)"],
    ["fira(rank=4, every=2)", "in_backward"],
    ["apollo(rank=4, every=2)"],
    ["int8_states"],
    ["lisa(layers=1, every=2)"],
    ["badam(every=1, parked='host')", "galore(rank=4, every=3)"],
]


def _with_nan(run: Session) -> None:
    """The last micro-batch of a step, whose gradients are no numbers."""
    with contextlib.suppress(NonFiniteGradientError), run.micro_batch():
        run.backward(model_loss(run.model, batch_of("plain", seed=77)) * float("nan"))


def _half_a_window(run: Session) -> None:
    with run.micro_batch(last=False):
        run.backward(model_loss(run.model, batch_of("plain", seed=77)))


def _after(stack: list[str], what: Any) -> tuple[dict[str, Tensor], Session]:
    model = model_of("plain")
    run = memrt.prepare(model, stack, lr=1e-2)
    train(run, "plain", count=3)
    good = copy.deepcopy((model.state_dict(), run.state_dict()))
    what(run)
    model.load_state_dict(good[0])
    run.load_state_dict(good[1])
    train(run, "plain", first=3, count=3)
    return weights(model), run


@pytest.mark.parametrize(
    ("stack", "what"),
    [
        *((stack, _with_nan) for stack in (*ONE_PASS, *STACKS)),
        *((stack, _half_a_window) for stack in STACKS),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_run_that_is_rolled_back_is_one_that_never_had_the_bad_batch(
    stack: list[str], what: Any
) -> None:
    never, _ = _after(stack, lambda run: None)
    rolled_back, run = _after(stack, what)
    assert run.step_index == 6
    assert_equal(rolled_back, never)


def test_a_state_that_is_refused_leaves_the_open_step_alone() -> None:
    run = memrt.prepare(PlainModel(), ["int8_states"])
    _half_a_window(run)
    other = memrt.prepare(PlainModel(), ["int4_states"])
    with pytest.raises(ValueError, match="resume with the same strategies"):
        run.load_state_dict(other.state_dict())
    assert all(p.grad is not None for p in run.model.parameters())
    run.step()
    assert run.step_index == 1


# ---------------------------------------------------------------- settings


OTHER_SETTINGS = [
    ("galore(rank=4, every=200)", "galore(rank=4, every=2)"),
    ("galore(rank=4)", "galore(rank=4, form='plain', scale=9.0)"),
    ("galore(rank=4, targets=['.1'])", "galore(rank=4, targets=['.3'])"),
    ("q_galore(rank=4, lazy=0.5)", "q_galore(rank=4)"),
    ("apollo(rank=4, seed=7)", "apollo(rank=4, seed=8)"),
    ("fira(rank=4, growth=None)", "fira(rank=4)"),
    ("lisa(layers=1)", "lisa(layers=1, seed=3)"),
    ("badam(every=3)", "badam(every=4)"),
]


@pytest.mark.parametrize(("written", "here"), OTHER_SETTINGS)
def test_the_state_of_other_settings_is_refused_and_nothing_is_loaded(
    written: str, here: str
) -> None:
    saved = memrt.prepare(model_of("plain"), [written])
    train(saved, "plain", count=2)
    run = memrt.prepare(model_of("plain"), [here])
    with pytest.raises(ValueError, match=r"the state was written with .*; resume with the same"):
        run.load_state_dict(saved.state_dict())
    assert run.step_index == 0
    assert run.optimizer is not None
    assert not run.optimizer.state


def test_what_differs_is_named_on_both_sides() -> None:
    state = memrt.prepare(model_of("plain"), ["galore(rank=4)"]).state_dict()
    run = memrt.prepare(model_of("plain"), ["galore(rank=4, every=2)"])
    message = r"written with galore\(rank=4\), this run has galore\(rank=4, every=2\); resume with"
    with pytest.raises(ValueError, match=message):
        run.load_state_dict(state)
    state["settings"][0]["attic"] = 3  # of a memrt that has one more
    with pytest.raises(ValueError, match=r"written with galore\(.*attic=3\), this run has galore"):
        run.load_state_dict(state)


def test_settings_come_back_from_a_file_as_they_went(tmp_path: Any) -> None:
    """Lists of names are tuples in a strategy and lists in JSON."""
    spec = "galore(rank=4, targets=['.1'])"
    state = memrt.prepare(model_of("plain"), [spec]).state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded["settings"][0]["targets"] = [".1"]
    memrt.prepare(model_of("plain"), [spec]).load_state_dict(loaded)


def test_settings_of_an_exact_strategy_may_change() -> None:
    state = memrt.prepare(model_of("plain"), ["offload_activations"]).state_dict()
    memrt.prepare(model_of("plain"), ["offload_activations(min_bytes=0)"]).load_state_dict(state)


def test_a_strategy_that_has_no_registered_name_is_compared_too() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Mine(Strategy):
        name: ClassVar[str] = "mine"
        size: int = 1

        def attach(self, run: Session) -> Attachment:
            return Attachment(self, run)

    state = memrt.prepare(PlainModel(), [Mine(size=2)]).state_dict()
    memrt.prepare(PlainModel(), [Mine(size=2)]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"written with mine\(size=2\), this run has mine"):
        memrt.prepare(PlainModel(), [Mine()]).load_state_dict(state)
