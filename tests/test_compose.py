"""Which strategies can run together, and what is said when they cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import nn

import memrt
from memrt.compose import check_all, conflicts, explain
from memrt.errors import ConflictError
from memrt.strategies.activation_checkpoint import ActivationCheckpoint
from memrt.strategies.lisa import Lisa
from memrt.strategy import Claim, Promise, Slot, Strategy
from memrt.structure import Facts, RunSettings, discover
from memrt.testing import PlainModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Left(Strategy):
    """Takes the state format of layer 0."""

    name: ClassVar[str] = "left"
    scope: tuple[str, ...] = ("layers.0",)

    def claims(self, facts: Facts) -> list[Claim]:
        return [Claim(slot=Slot.STATE_FORMAT, scope=frozenset(self.scope))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Right(Left):
    """Takes the state format of a scope, too."""

    name: ClassVar[str] = "right"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatesInBackward(Strategy):
    """Breaks what clipping and checkpointing need."""

    name: ClassVar[str] = "in_backward"
    breaks: ClassVar[frozenset[Promise]] = frozenset(
        {Promise.GRADIENTS_OUTLIVE_BACKWARD, Promise.PARAMETERS_REST_IN_BACKWARD}
    )


def _facts(**settings: object) -> Facts:
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
    model = nn.ModuleDict({"layers": blocks})
    return Facts(
        model=model,
        structure=discover(model),
        settings=RunSettings(**settings),  # type: ignore[arg-type]
    )


def test_two_claims_collide_only_on_the_same_thing() -> None:
    assert conflicts([Left(), Right(scope=("layers.1",))], _facts()) == []
    (problem,) = conflicts([Left(), Right(scope=("layers.0", "layers.1"))], _facts())
    assert "left" in problem
    assert "right" in problem
    assert "state format" in problem
    assert "layers.0" in problem


def test_the_trainers_settings_take_part() -> None:
    assert conflicts([UpdatesInBackward()], _facts()) == []
    (problem,) = conflicts([UpdatesInBackward()], _facts(max_grad_norm=1.0))
    assert "max_grad_norm=1" in problem
    assert "in_backward" in problem
    (problem,) = conflicts([UpdatesInBackward()], _facts(accumulation_steps=4))
    assert "gradient_accumulation_steps=4" in problem
    (problem,) = conflicts([ActivationCheckpoint()], _facts(gradient_checkpointing=True))
    assert "gradient_checkpointing=True" in problem
    (problem,) = conflicts([Lisa()], _facts(data_parallel=True))
    assert "CUDA_VISIBLE_DEVICES" in problem
    assert conflicts([], _facts(data_parallel=True)) == []


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConflictError) as raised:
        check_all(
            [Left(), Right(), UpdatesInBackward(), ActivationCheckpoint()],
            _facts(max_grad_norm=1.0),
        )
    assert len(raised.value.problems) == 3
    assert all(problem in str(raised.value) for problem in raised.value.problems)


def test_refusals_by_the_model_are_collected_too() -> None:
    with pytest.raises(ConflictError) as raised:
        check_all([Lisa(layers=4), ActivationCheckpoint(every=9)], _facts())
    assert [p.split(":")[0] for p in raised.value.problems] == ["lisa", "activation_checkpoint"]


def test_explain_names_order_ownership_and_conflicts() -> None:
    text = explain([Left(), Right()], _facts())
    assert "owns state format of layers.0" in text
    assert "conflict:" in text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("betas", (0.9, 1.0)),
        ("epsilon", 0.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1.0),
    ],
)
def test_bad_run_settings_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"must"):
        RunSettings(**{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": "1e-3"}, r"lr='1e-3': must be a number, such as lr=0\.001"),
        ({"lr": True}, r"lr=True: must be a number"),
        ({"betas": 0.9}, r"betas=0\.9: both must lie in \[0, 1\); give two numbers, such as"),
        ({"betas": (0.9,)}, r"betas=\(0\.9,\): both must .*give two numbers"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas=\(0\.9, 0\.99, 0\.999\): both must"),
        ({"betas": (0.9, "0.99")}, r"betas=\(0\.9, '0\.99'\): both must"),
        ({"eps": "1e-8"}, r"eps='1e-8': must be a number, such as eps=1e-08"),
        ({"weight_decay": "0.1"}, r"weight_decay='0\.1': must be a number"),
        (
            {"max_grad_norm": "1"},
            r"max_grad_norm='1': must be a number, such as max_grad_norm=1\.0",
        ),
        ({"max_grad_norm": None}, r"max_grad_norm=None: must be a number"),
        ({"seed": "a"}, r"seed='a': must be a whole number"),
        ({"betas": ()}, r"betas=\(\): both must lie in"),
        ({"lr": float("inf")}, r"lr=inf: the learning rate must"),
        ({"eps": float("inf")}, r"eps=inf: must be above 0"),
        ({"weight_decay": float("inf")}, r"weight_decay=inf: must be"),
        ({"accumulation_steps": "4"}, r"accumulation_steps='4': must be a whole number"),
        ({"accumulation_steps": -1}, r"accumulation_steps=-1: must be a whole number"),
        ({"stochastic_rounding": "no"}, r"stochastic_rounding='no': must be True or False"),
        ({"optimizer": "adam"}, r"optimizer='adam': must be a torch\.optim\.Optimizer"),
        ({"probe_batches": []}, r"probe_batches=list: must be a function"),
    ],
)
@pytest.mark.parametrize("stack", [[], ["int8_states"]], ids=str)
def test_what_is_no_number_is_named_with_its_value_and_a_remedy(
    given: dict[str, Any], message: str, stack: list[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        memrt.prepare(PlainModel(), stack, **given)


def test_betas_may_be_a_list() -> None:
    assert RunSettings(betas=[0.9, 0.999]) == RunSettings()  # type: ignore[arg-type]
