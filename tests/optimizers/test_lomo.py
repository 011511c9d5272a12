"""LOMO's rule against torch's SGD, and what optimizers that step one by one have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from memrt.optimizers import lomo
from memrt.optimizers.adalomo import AdaLomo
from memrt.optimizers.lomo import Lomo
from memrt.optimizers.parameterwise import ParameterwiseOptimizer

SHAPES = [(6, 5), (7,), (3, 4, 2), (), (0, 4)]
KINDS: list[type[ParameterwiseOptimizer]] = [Lomo, AdaLomo]


def new_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.dtype)


def assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert torch.equal(mine, yours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lomo_has_the_bits_of_torchs_sgd(dtype: torch.dtype) -> None:
    ours, theirs = new_parameters(dtype), new_parameters(dtype)
    nearest = Lomo(ours, lr=3e-2, stochastic_rounding=False)
    optimizers = nearest, torch.optim.SGD(theirs, lr=3e-2, foreach=False)
    for step in range(4):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(parameters, step)
            optimizer.step()
        assert_same(ours, theirs)
    assert optimizers[0].state_dict()["state"] == {}


def test_lomo_decays_apart_from_the_gradient_and_bounds_its_elements() -> None:
    (weight,) = parameters = [nn.Parameter(torch.tensor([1.0, -2.0, 4.0]))]
    optimizer = Lomo(parameters, lr=0.5, weight_decay=0.5, clip_value=0.25)
    weight.grad = torch.tensor([0.125, -8.0, 8.0])
    optimizer.step()
    assert weight.tolist() == [1.0 * 0.75 - 0.0625, -2.0 * 0.75 + 0.125, 4.0 * 0.75 - 0.125]


@pytest.mark.parametrize("kind", KINDS)
def test_one_parameter_at_a_time_gives_the_same_bits(kind: type[ParameterwiseOptimizer]) -> None:
    runs = [new_parameters() for _ in range(2)]
    at_once, one_by_one = [
        kind([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.1}], weight_decay=0.1)  # type: ignore[call-arg]
        for ps in runs
    ]
    for step in range(4):
        for parameters in runs:
            give_gradients(parameters, step)
        at_once.step()
        for parameter in reversed(runs[1]):
            one_by_one.step_parameters([parameter])
            parameter.grad = None
        one_by_one.step()  # nothing is left to do
        assert_same(*runs)
        runs[1], one_by_one = copy.deepcopy((runs[1], one_by_one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_and_keeps_fp32_state(
    kind: type[ParameterwiseOptimizer], dtype: torch.dtype
) -> None:
    whole, resumed = new_parameters(dtype), new_parameters(dtype)
    one, other = kind(whole, lr=1e-2), kind(resumed, lr=0.5)  # type: ignore[call-arg]
    for step in range(3):
        give_gradients(whole, step)
        one.step()
    for mine, yours in zip(resumed, whole, strict=True):
        mine.data.copy_(yours)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    states = [value for state in other.state.values() for value in state.values()]
    assert {state.dtype for state in states} <= {torch.float32}
    for step in range(3, 6):
        for parameters, optimizer in ((whole, one), (resumed, other)):
            give_gradients(parameters, step)
            optimizer.step()
    assert_same(whole, resumed)


@pytest.mark.parametrize("frees", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize(("kind", "rate"), [(Lomo, 1e-3), (AdaLomo, 1e-3 / 1.5)])
def test_small_updates_of_bf16_weights_arrive_in_the_mean(
    kind: type[ParameterwiseOptimizer], rate: float, frees: bool
) -> None:
    """An eighth of bf16's spacing a step: of independent draws, element by element and in all."""
    num_steps, unit = 200, 2**-7
    exact, rounded, nearest = (
        nn.Parameter(torch.full((64, 64), 1.5, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    optimizers = [kind([weight], lr=rate) for weight in (exact, rounded)]  # type: ignore[call-arg]
    optimizers.append(kind([nearest], lr=rate, stochastic_rounding=False))  # type: ignore[call-arg]
    for _ in range(num_steps):
        for weight, optimizer in zip((exact, rounded, nearest), optimizers, strict=True):
            weight.grad = torch.full_like(weight, -1.0)
            if frees:
                optimizer.state.clear()
            optimizer.step()
    assert (nearest == 1.5).all()
    aim = float(exact.detach().mean()) - 1.5
    moved = rounded.detach().double() - 1.5
    chance = aim / num_steps / unit
    spread = unit * (num_steps * chance * (1 - chance)) ** 0.5
    count = moved.numel()
    # adalomo's rate follows the weight, which is 1 % off where its mean is
    assert abs(float(moved.mean()) - aim) < 5 * spread / count**0.5 + 0.01 * aim
    assert abs(float(moved.std()) / spread - 1) < 5 / (2 * count) ** 0.5 + 0.02
    assert moved.all()


def test_lomo_rounds_in_pieces_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (2**22, 4):
        monkeypatch.setattr(lomo, "PIECE_ELEMENTS", size)
        parameters = new_parameters(torch.bfloat16)
        optimizer = Lomo(parameters, lr=1e-2, weight_decay=0.1, clip_value=0.5)
        give_gradients(parameters, 0)
        optimizer.step()
        found.append(parameters)
    assert_same(*found)
    turned = nn.Parameter(new_parameters(torch.bfloat16)[0].detach().t().contiguous().t())
    optimizer = Lomo([turned], lr=1e-2, weight_decay=0.1, clip_value=0.5)
    give_gradients(parameters, 0)
    turned.grad = parameters[0].grad
    optimizer.step()
    assert torch.equal(turned, parameters[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_before_there_was_rounding_loads(
    kind: type[ParameterwiseOptimizer],
) -> None:
    parameters = new_parameters(torch.bfloat16)
    optimizer = kind(parameters, stochastic_rounding=False)  # type: ignore[call-arg]
    give_gradients(parameters, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["num_updates"]
    for group in saved["param_groups"]:
        del group["stochastic_rounding"], group["rounding_seed"]
    resumed = kind(parameters, rounding_seed=3)  # type: ignore[call-arg]
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["stochastic_rounding"] is True
    assert resumed.param_groups[0]["rounding_seed"] == 3
    resumed.step()


def test_the_state_of_another_rule_is_refused() -> None:
    parameters = new_parameters()
    give_gradients(parameters, 0)
    adalomo = AdaLomo(parameters)
    adalomo.step()
    with pytest.raises(ValueError, match=r"Lomo expects \{\}; resume with"):
        Lomo(parameters).load_state_dict(adalomo.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_and_closures_work(kind: type[ParameterwiseOptimizer]) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=1.0)  # type: ignore[call-arg]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (weight != 1).all()
    scheduler.step()
    before = weight.detach().clone()
    optimizer.step(closure)
    assert torch.equal(weight, before)  # the rate is 0 now


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (Lomo, {"lr": -1.0}, "lr=-1.0"),
        (Lomo, {"weight_decay": True}, "weight_decay=True"),
        (Lomo, {"clip_value": 0.0}, "clip_value=0.0"),
        (Lomo, {"stochastic_rounding": 1}, "stochastic_rounding=1"),
        (AdaLomo, {"rounding_seed": 0.5}, "rounding_seed=0.5"),
        (AdaLomo, {"eps": (1e-30, -1.0)}, "eps=-1.0"),
        (AdaLomo, {"clip_threshold": 0.0}, "clip_threshold=0.0"),
        (AdaLomo, {"decay_rate": 0.8}, "decay_rate=0.8"),
    ],
)
def test_wrong_settings_are_refused(
    kind: type[ParameterwiseOptimizer], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        kind(new_parameters(), **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_parameters_and_gradients_are_refused(kind: type[ParameterwiseOptimizer]) -> None:
    with pytest.raises(ValueError, match="float64"):
        kind([nn.Parameter(torch.ones(2, dtype=torch.float64))])  # type: ignore[call-arg]
    shared = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="shares its storage"):
        kind([shared, nn.Parameter(shared.detach())])  # type: ignore[call-arg]
    optimizer = kind([shared])  # type: ignore[call-arg]
    shared.grad = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out_whole(
    kind: type[ParameterwiseOptimizer], value: float
) -> None:
    parameters, undisturbed = new_parameters(), new_parameters()
    optimizer, other = kind(parameters, lr=1e-2), kind(undisturbed, lr=1e-2)
    for step in range(3):
        give_gradients(parameters, step)
        if step == 1:
            assert parameters[1].grad is not None
            parameters[1].grad[3] = value
        else:
            give_gradients(undisturbed, step)
            other.step()
        optimizer.step()
    assert_same(parameters, undisturbed)
    resumed = kind(new_parameters(), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    assert optimizer.num_skipped_steps == resumed.num_skipped_steps == 1
    assert copy.deepcopy(optimizer).num_skipped_steps == 1


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [(Lomo, AdaLomo), (AdaLomo, Lomo)]
    + [(kind, theirs) for kind in KINDS for theirs in (torch.optim.SGD, torch.optim.AdamW)],
)
def test_groups_of_another_rule_are_refused(
    kind: type[ParameterwiseOptimizer], theirs: type[torch.optim.Optimizer]
) -> None:
    parameters = new_parameters()
    give_gradients(parameters, 0)
    saved = theirs(new_parameters(), lr=0.1).state_dict()  # of no step: no state could tell
    optimizer = kind(parameters, lr=0.5)
    with pytest.raises(ValueError, match="resume with the optimizer that wrote the state"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.step()
