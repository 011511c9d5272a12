"""The composed AdamW against torch's, against bitsandbytes', and against itself on fake tensors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.optimizers.adamw import AdamW
from memrt.optimizers.state_formats import STATE_FORMATS

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(80, 64), (64,), (3, 5, 7), (1,), (0, 4)]
LARGE, SMALL = (80, 64), (64,)  # above and below 4096 elements


def new_parameters(
    shapes: list[tuple[int, ...]] | None = None, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in shapes or SHAPES
    ]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.dtype)


def train(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    steps: range,
    after: Callable[[], None] | None = None,
) -> None:
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()
        if after is not None:
            after()


def assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert torch.equal(mine, yours)


class Lift:
    """A projection for tests: R is set by hand, rows are lifted by a matrix."""

    def __init__(self, matrix: Tensor, width: int, *, scale: float = 1.0) -> None:
        self.matrix, self.width, self.scale = matrix, width, scale  # matrix [rank, rows]
        self.low_rank: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.width)

    def project(self, gradient: Tensor) -> None:
        self.low_rank = self.matrix @ gradient

    def gradient(self) -> Tensor | None:
        return self.low_rank

    def take_rotation(self) -> Tensor | None:
        return None

    def apply(
        self,
        weight: Tensor,
        direction: Tensor,
        *,
        lr: float,
        decay: float = 1.0,
        rounding: Rounding | None = None,
    ) -> None:
        total = weight.float().mul_(decay)
        total.sub_(lr * self.scale * (self.matrix.t() @ direction))
        if rounding is None:
            weight.copy_(total)
        else:
            stochastic_copy_(weight, total, rounding=rounding)


# ---------------------------------------------------------------- float32


def test_same_bits_as_torch_fused() -> None:
    ours, theirs = new_parameters(), new_parameters()
    train(AdamW(ours, **SETTINGS), ours, range(10))
    train(torch.optim.AdamW(theirs, fused=True, **SETTINGS), theirs, range(10))
    assert_same(ours, theirs)


def test_same_defaults_as_torch() -> None:
    ours, theirs = new_parameters(), new_parameters()
    train(AdamW(ours), ours, range(3))
    train(torch.optim.AdamW(theirs, fused=True), theirs, range(3))
    assert_same(ours, theirs)


def test_groups_have_settings_of_their_own() -> None:
    def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": parameters[:2], "lr": 3e-2, "weight_decay": 0.0},
            {"params": parameters[2:], "betas": (0.8, 0.9), "eps": 1e-3},
        ]

    ours, theirs = new_parameters(), new_parameters()
    train(AdamW(groups(ours), **SETTINGS), ours, range(5))
    train(torch.optim.AdamW(groups(theirs), fused=True, **SETTINGS), theirs, range(5))
    assert_same(ours, theirs)


def test_every_parameter_counts_its_own_steps() -> None:
    """Bias correction follows the steps in which a gradient came."""
    ours, theirs = new_parameters(), new_parameters()
    pairs = [
        (AdamW(ours, **SETTINGS), ours),
        (torch.optim.AdamW(theirs, fused=True, **SETTINGS), theirs),
    ]
    for optimizer, parameters in pairs:
        for step in range(6):
            give_gradients(parameters, step)
            if step % 2:
                parameters[0].grad = None
            optimizer.step()
    assert_same(ours, theirs)
    assert pairs[0][0].state[ours[0]]["step"] == 3
    assert pairs[0][0].state[ours[1]]["step"] == 6


def test_state_is_created_at_the_first_gradient() -> None:
    parameters = new_parameters([LARGE, SMALL])
    optimizer = AdamW(parameters, state_format="int8")
    optimizer.step()
    assert not optimizer.state
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step()
    assert list(optimizer.state) == [parameters[1]]


@pytest.mark.parametrize("name", ["LinearLR", "CosineAnnealingLR", "OneCycleLR"])
def test_schedulers_work_as_with_torch(name: str) -> None:
    options: dict[str, Any] = {
        "LinearLR": {"start_factor": 0.1, "total_iters": 5},
        "CosineAnnealingLR": {"T_max": 8},
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},  # also moves beta1
    }[name]
    ours, theirs = new_parameters(), new_parameters()
    for parameters, optimizer in [
        (ours, AdamW(ours, **SETTINGS)),
        (theirs, torch.optim.AdamW(theirs, fused=True, **SETTINGS)),
    ]:
        scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **options)
        train(optimizer, parameters, range(8), after=scheduler.step)
    assert_same(ours, theirs)


def test_closure_is_called_with_gradients_enabled() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight], **SETTINGS)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (weight < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_format", ["float32", "int8"])
def test_one_parameter_at_a_time_gives_the_same_bits(state_format: str, dtype: torch.dtype) -> None:
    """In any order, with groups that differ, after a load that replaces the groups, and copied."""
    runs = [new_parameters(dtype=dtype) for _ in range(2)]
    at_once, one_by_one = [
        AdamW(
            [{"params": ps[:1]}, {"params": ps[1:3], "lr": 3e-2}, {"params": ps[3:]}],
            **SETTINGS,
            state_format=state_format,
        )
        for ps in runs
    ]
    for step in range(5):
        for parameters in runs:
            give_gradients(parameters, step)
            parameters[2].grad = None if step == 1 else parameters[2].grad
        at_once.step()
        for parameter in reversed(runs[1]):
            one_by_one.step_parameters([parameter])
            parameter.grad = None
        one_by_one.step()  # nothing is left to do
        assert_same(*runs)
        if step == 2:
            one_by_one.load_state_dict(one_by_one.state_dict())
        if step == 3:
            runs[1], one_by_one = copy.deepcopy((runs[1], one_by_one))
    assert [int(one_by_one.state[p]["step"]) for p in runs[1]] == [5, 5, 4, 5, 5]


# ---------------------------------------------------------------- int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_has_the_bits_of_bitsandbytes_on_the_cpu(dtype: torch.dtype) -> None:
    from bitsandbytes.optim import AdamW8bit

    ours, theirs = new_parameters([LARGE, (5001,)], dtype), new_parameters([LARGE, (5001,)], dtype)
    optimizer = AdamW(ours, **SETTINGS, state_format="int8", stochastic_rounding=False)
    known = AdamW8bit(theirs, **SETTINGS)
    train(optimizer, ours, range(6))
    train(known, theirs, range(6))
    assert_same(ours, theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg_codes"], known.state[yours]["state1"])
        assert torch.equal(optimizer.state[mine]["exp_avg_sq_codes"], known.state[yours]["state2"])


def test_small_parameters_keep_float32_state() -> None:
    parameters = new_parameters([LARGE, SMALL, (4095,), (4096,)])
    optimizer = AdamW(parameters, **SETTINGS, state_format="int8")
    train(optimizer, parameters, range(2))
    kinds = ["exp_avg_codes" in optimizer.state[parameter] for parameter in parameters]
    assert kinds == [True, False, False, True]
    theirs = new_parameters([LARGE, SMALL, (4095,), (4096,)])
    train(torch.optim.AdamW(theirs, fused=True, **SETTINGS), theirs, range(2))
    assert torch.equal(parameters[1], theirs[1])


def test_int8_stays_near_float32() -> None:
    """A step is lr * N with |N| about 1; 8 bits leave N within a few hundredths on average."""
    ours, theirs = new_parameters([LARGE]), new_parameters([LARGE])
    train(AdamW(ours, **SETTINGS, state_format="int8"), ours, range(50))
    train(torch.optim.AdamW(theirs, fused=True, **SETTINGS), theirs, range(50))
    moved = (theirs[0] - new_parameters([LARGE])[0]).norm()
    assert (ours[0] - theirs[0]).norm() < 0.05 * moved
    assert not torch.equal(ours[0], theirs[0])


def test_formats_mix_between_groups() -> None:
    parameters = new_parameters([LARGE, LARGE])
    groups = [{"params": parameters[:1], "state_format": "int8"}, {"params": parameters[1:]}]
    optimizer = AdamW(groups, **SETTINGS)
    train(optimizer, parameters, range(2))
    assert "exp_avg_codes" in optimizer.state[parameters[0]]
    assert "exp_avg" in optimizer.state[parameters[1]]


# ---------------------------------------------------------------- projections


@pytest.mark.parametrize("state_format", list(STATE_FORMATS))
def test_identity_projection_is_adamw(state_format: str) -> None:
    """The same update by another route: equal up to the roundings of N and of lr * N."""
    (ours,), (theirs,) = new_parameters([LARGE]), new_parameters([LARGE])
    lift = Lift(torch.eye(80), 64)
    projected = AdamW([ours], **SETTINGS, state_format=state_format, projections={ours: lift})
    plain = AdamW([theirs], **SETTINGS, state_format=state_format)
    for step in range(10):
        give_gradients([theirs], step)
        lift.project(theirs.grad)
        projected.step()
        plain.step()
    assert ours.grad is None
    for key, value in plain.state[theirs].items():
        assert torch.equal(projected.state[ours][key], value)
    # each step: one rounding of the decayed weight, one of N, one of lr * N, one of the sum
    torch.testing.assert_close(ours, theirs, rtol=10 * 4 * 2**-24, atol=10 * 4 * 2**-24 * 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projected_step_is_the_formula(dtype: torch.dtype) -> None:
    """W <- W (1 - lr wd) - lr scale P' N, with N from torch's AdamW on R, in fp64."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(80, 4, generator=generator))[0].t().contiguous()
    (weight,) = new_parameters([LARGE], dtype)
    lift = Lift(basis, 64, scale=0.25)
    optimizer = AdamW([weight], **SETTINGS, projections={weight: lift})
    exact = weight.detach().double()
    probe = nn.Parameter(torch.zeros(4, 64).double())
    rule = torch.optim.AdamW([probe], **{**SETTINGS, "lr": 1.0, "weight_decay": 0.0})
    for _ in range(3):
        lift.project(torch.randn(80, 64, generator=generator))
        assert lift.low_rank is not None
        optimizer.step()
        before = probe.detach().clone()
        probe.grad = lift.low_rank.double()
        rule.step()
        exact.mul_(1 - 1e-2 * 0.1).add_(
            basis.double().t() @ (probe.detach() - before), alpha=2.5e-3
        )
    assert optimizer.state[weight]["exp_avg"].shape == (4, 64)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    # bf16 rounds the weight twice a step; fp32 as in the test above
    error = 3 * 2 * 2**-9 if dtype == torch.bfloat16 else 3 * 4 * 2**-24
    torch.testing.assert_close(weight.detach().double(), exact, rtol=error, atol=error)


def test_a_projection_without_a_gradient_is_skipped() -> None:
    (weight,) = new_parameters([LARGE])
    before = weight.detach().clone()
    optimizer = AdamW([weight], **SETTINGS, projections={weight: Lift(torch.eye(80), 64)})
    optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state


def test_a_dense_gradient_of_a_projected_weight_is_refused() -> None:
    (weight,) = new_parameters([LARGE])
    optimizer = AdamW([weight], projections={weight: Lift(torch.eye(80), 64)})
    give_gradients([weight], 0)
    with pytest.raises(ValueError, match=r"dense \.grad"):
        optimizer.step()


def test_a_projection_of_an_unknown_weight_is_refused() -> None:
    first, second = new_parameters([LARGE, LARGE])
    with pytest.raises(ValueError, match="in no parameter group"):
        AdamW([first], projections={second: Lift(torch.eye(80), 64)})


def test_a_rank_that_changes_under_the_state_is_refused() -> None:
    (weight,) = new_parameters([LARGE])
    lift = Lift(torch.eye(80)[:8], 64)
    optimizer = AdamW([weight], projections={weight: lift})
    for rank in (8, 4):
        lift.matrix = torch.eye(80)[:rank]
        lift.project(torch.ones(80, 64))
        if rank == 8:
            optimizer.step()
    with pytest.raises(ValueError, match=r"exp_avg .*\(8, 64\).*expected \(4, 64\)"):
        optimizer.step()


# ---------------------------------------------------------------- bf16 weights


def test_stochastic_rounding_is_on_and_can_be_turned_off() -> None:
    """Equal parameters get rounding of their own; another seed gives another."""
    results = {}
    for label, options in {
        "default": {},
        "seeded": {"rounding_seed": 1},
        "nearest": {"stochastic_rounding": False},
    }.items():
        weights = [nn.Parameter(torch.ones(128).bfloat16()) for _ in range(2)]
        optimizer = AdamW(weights, lr=1e-3, weight_decay=0.0, **options)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        results[label] = [weight.detach().clone() for weight in weights]
    assert optimizer.param_groups[0]["stochastic_rounding"] is False
    assert not torch.equal(*results["default"])
    assert not torch.equal(results["default"][0], results["seeded"][0])
    assert torch.equal(results["nearest"][0], torch.ones(128).bfloat16())


@pytest.mark.parametrize("state_format", list(STATE_FORMATS))
def test_a_projected_bf16_weight_keeps_small_decays_in_the_mean(state_format: str) -> None:
    """lr * weight_decay = 2^-12 of 1: 64 steps take 1.6 % off, or to the nearest nothing."""
    for stochastic, expected in ((True, (1 - 2**-12) ** 64), (False, 1.0)):
        weight = nn.Parameter(torch.ones(80, 64).bfloat16())
        lift = Lift(torch.eye(80), 64)
        lift.low_rank = torch.zeros(80, 64)
        optimizer = AdamW(
            [weight],
            lr=2**-6,
            weight_decay=2**-6,
            state_format=state_format,
            stochastic_rounding=stochastic,
            projections={weight: lift},
        )
        for _ in range(64):
            optimizer.step()
        # 64 steps of 2^-8 with probability 1/16 in each of 5120 weights; five standard deviations
        assert weight.float().mean().item() == pytest.approx(expected, abs=5 * 2 * 2**-8 / 71)


def test_rounding_goes_on_in_a_resumed_run_with_the_saved_seed() -> None:
    whole = new_parameters([LARGE, SMALL], torch.bfloat16)
    optimizer = AdamW(whole, **SETTINGS, rounding_seed=5)
    train(optimizer, whole, range(2))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in whole]
    resumed = AdamW(second, **SETTINGS)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, whole, range(2, 4))
    train(resumed, second, range(2, 4))
    assert_same(second, whole)


# ---------------------------------------------------------------- gradients that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("state_format", list(STATE_FORMATS))
def test_a_gradient_that_is_not_finite_skips_the_whole_step(state_format: str, bad: float) -> None:
    parameters = new_parameters([LARGE, SMALL])
    optimizer = AdamW(parameters, **SETTINGS, state_format=state_format)
    train(optimizer, parameters, range(2))
    weights = [parameter.detach().clone() for parameter in parameters]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    give_gradients(parameters, 2)
    parameters[1].grad[7] = bad
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert_same(parameters, weights)
    for leaf, kept in zip(
        tree_leaves(optimizer.state_dict()["state"]), tree_leaves(state), strict=True
    ):
        assert torch.equal(leaf, kept) if isinstance(leaf, Tensor) else leaf == kept
    train(optimizer, parameters, range(3, 4))
    assert optimizer.num_skipped_steps == 1
    assert optimizer.state[parameters[0]]["step"] == 3
    resumed = AdamW(parameters, state_format=state_format)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert resumed.num_skipped_steps == 1


def test_a_projected_gradient_that_is_not_finite_skips_the_step_too() -> None:
    weight, other = new_parameters([LARGE, SMALL])
    lift = Lift(torch.eye(80), 64)
    optimizer = AdamW([weight, other], **SETTINGS, projections={weight: lift})
    lift.low_rank = torch.full((80, 64), torch.nan)
    other.grad = torch.ones_like(other)
    before = [weight.detach().clone(), other.detach().clone()]
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert_same([weight, other], before)


HUGE = 2.0**64
"""The least number whose square is infinite in fp32."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_finite_gradients_are_not_skipped(dtype: torch.dtype) -> None:
    """The sum of their squares is infinite (in fp16 their sum), the square of each is not."""
    (weight,) = new_parameters([(512, 8)], dtype)
    optimizer = AdamW([weight], **SETTINGS)
    eps = torch.finfo(dtype).eps
    weight.grad = torch.full_like(weight, min(torch.finfo(dtype).max, HUGE * (1 - eps)))
    optimizer.step()
    assert optimizer.num_skipped_steps == 0
    assert optimizer.state[weight]["exp_avg_sq"].isfinite().all()


@pytest.mark.parametrize("state_format", list(STATE_FORMATS))
@pytest.mark.parametrize("huge", [HUGE, 1e30, -1e30, torch.finfo(torch.float32).max])
def test_a_gradient_with_an_infinite_square_skips_the_whole_step(
    state_format: str, huge: float
) -> None:
    """In every format alike, and the steps after it are those of a run without it."""
    found = []
    for values in ([1.0, 1.0, 1.0], [1.0, huge, 1.0, 1.0]):
        parameters = new_parameters([LARGE, SMALL])
        optimizer = AdamW(parameters, **SETTINGS, state_format=state_format)
        for step, value in enumerate(values):
            give_gradients(parameters, 0)
            if value == huge:
                parameters[0].grad[3, 5] = huge
            optimizer.step()
            assert optimizer.num_skipped_steps == int(huge in values and step > 0), step
        found.append(parameters)
    assert_same(found[1], found[0])


def test_a_projected_gradient_with_an_infinite_square_skips_the_step_too() -> None:
    (weight,) = new_parameters([LARGE])
    lift = Lift(torch.eye(80), 64)
    optimizer = AdamW([weight], **SETTINGS, projections={weight: lift})
    lift.low_rank, before = torch.full((80, 64), 1e30), [weight.detach().clone()]
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert_same([weight], before)


# ---------------------------------------------------------------- saving and loading


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_format", list(STATE_FORMATS))
def test_resume_is_exact(state_format: str, dtype: torch.dtype) -> None:
    whole = new_parameters([LARGE, SMALL], dtype)
    train(AdamW(whole, **SETTINGS, state_format=state_format), whole, range(8))

    first = new_parameters([LARGE, SMALL], dtype)
    optimizer = AdamW(first, **SETTINGS, state_format=state_format)
    train(optimizer, first, range(4))
    state = saved_and_loaded(optimizer.state_dict())

    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = AdamW(second, lr=7.0, state_format=state_format)
    resumed.load_state_dict(state)
    for mine, yours in zip(second, first, strict=True):
        for key, value in optimizer.state[yours].items():
            assert resumed.state[mine][key].dtype == value.dtype
            assert torch.equal(resumed.state[mine][key], value)
    train(resumed, second, range(4, 8))
    assert_same(second, whole)


def test_resume_of_a_projected_weight_is_exact() -> None:
    weights = []
    for resume in (False, True):
        (weight,) = new_parameters([LARGE])
        lift = Lift(torch.eye(80)[:70], 64)
        optimizer = AdamW([weight], **SETTINGS, state_format="int8", projections={weight: lift})
        for step in range(6):
            if resume and step == 3:
                state = saved_and_loaded(optimizer.state_dict())
                optimizer = AdamW([weight], state_format="int8", projections={weight: lift})
                optimizer.load_state_dict(state)
            lift.project(torch.randn(80, 64, generator=torch.Generator().manual_seed(step)))
            optimizer.step()
        weights.append(weight)
    assert torch.equal(*weights)


def test_loading_its_own_state_changes_nothing() -> None:
    """accelerate does this to every optimizer at prepare."""
    parameters = new_parameters([LARGE, SMALL], torch.bfloat16)
    optimizer = AdamW(parameters, **SETTINGS, state_format="int8")
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, parameters, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    for leaf, kept in zip(tree_leaves(optimizer.state_dict()), tree_leaves(before), strict=True):
        if isinstance(leaf, Tensor):
            assert leaf.dtype == kept.dtype
            assert torch.equal(leaf, kept)
        else:
            assert leaf == kept


def test_hooks_see_what_torch_shows_them() -> None:
    parameters = new_parameters([LARGE])
    optimizer = AdamW(parameters, **SETTINGS)
    train(optimizer, parameters, range(1))
    seen: list[int] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
    optimizer.register_load_state_dict_post_hook(lambda done: seen.append(len(done.state)))
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [1, 1, 1, 1]


def test_state_of_another_format_is_refused() -> None:
    parameters = new_parameters([SMALL, LARGE])
    optimizer = AdamW(parameters, **SETTINGS)
    train(optimizer, parameters, range(1))
    other = AdamW(parameters, **SETTINGS, state_format="int8")
    with pytest.raises(ValueError, match=r"parameter 0 .*'float32', expected 'int8'"):
        other.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    state["param_groups"][0]["state_format"] = "int8"
    with pytest.raises(ValueError, match=r"parameter 1 holds .*exp_avg.* expected .*codes"):
        other.load_state_dict(state)
    assert not other.state
    assert other.param_groups[0]["lr"] == SETTINGS["lr"]


def test_state_of_another_shape_is_refused() -> None:
    narrow, wide = new_parameters([SMALL, (64, 80)]), new_parameters([SMALL, (80, 64)])
    optimizer = AdamW(narrow, **SETTINGS, state_format="int8")
    train(optimizer, narrow, range(1))
    other = AdamW(wide, **SETTINGS, state_format="int8")
    with pytest.raises(ValueError, match=r"parameter 1 is \(64, 80\) .*expected \(80, 64\)"):
        other.load_state_dict(optimizer.state_dict())


def test_state_of_torch_adamw_is_refused() -> None:
    parameters = new_parameters([LARGE])
    theirs = torch.optim.AdamW(parameters, fused=True)
    train(theirs, parameters, range(1))
    with pytest.raises(ValueError, match="parameter 0 was saved with state_format=None"):
        AdamW(parameters).load_state_dict(theirs.state_dict())


def test_other_groups_are_refused() -> None:
    parameters = new_parameters([LARGE, SMALL])
    state = AdamW(parameters).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}]).load_state_dict(state)


def test_copies_work() -> None:
    model = nn.Linear(80, 64)
    optimizer = AdamW(model.parameters(), **SETTINGS, state_format="int8")
    give_gradients(list(model.parameters()), 0)
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for part, driver in ((model, optimizer), (twin, twin_optimizer)):
        give_gradients(list(part.parameters()), 1)
        driver.step()
    assert torch.equal(model.weight, twin.weight)


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": torch.tensor(1e-3)}, "lr=tensor"),
        ({"lr": True}, "lr=True"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"betas": 0.9}, r"betas=0\.9 must be two numbers"),
        ({"betas": ("x", 0.9)}, r"betas=.* must be two numbers"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"state_format": "int7"}, "state_format='int7'.*float32.*int8"),
        ({"stochastic_rounding": 1}, "stochastic_rounding=1 is not a bool"),
        ({"rounding_seed": 0.5}, "rounding_seed=0.5 is not a int"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdamW(new_parameters([LARGE]), **settings)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    first, second = new_parameters([LARGE, SMALL])
    optimizer = AdamW([first])
    with pytest.raises(ValueError, match="maximize=True has no effect"):
        optimizer.add_param_group({"params": [second], "maximize": True})
    assert len(optimizer.param_groups) == 1


def test_shared_storage_is_refused() -> None:
    (first,) = new_parameters([LARGE])
    second = nn.Parameter(first.detach().t())
    with pytest.raises(ValueError, match="shares its storage"):
        AdamW([first, second])
    halves = torch.zeros(2, 8)
    AdamW([nn.Parameter(halves[0]), nn.Parameter(halves[1])])


def test_fp64_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        AdamW(new_parameters([LARGE], torch.float64))


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()


def test_a_format_that_changes_under_the_state_is_refused() -> None:
    parameters = new_parameters([LARGE])
    optimizer = AdamW(parameters)
    train(optimizer, parameters, range(1))
    optimizer.param_groups[0]["state_format"] = "int8"
    with pytest.raises(ValueError, match=r"expected .*exp_avg_codes"):
        train(optimizer, parameters, range(1))


# ---------------------------------------------------------------- bytes, real and fake


class _Born(TorchDispatchMode):
    """Every storage that an operator makes, in order, in bytes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.storages = {id(t.untyped_storage()): t.untyped_storage() for t in known}
        self.born: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self.storages:
                storage = leaf.untyped_storage()
                self.storages[id(storage)] = storage  # kept alive: ids are not used again
                self.born.append((str(func), storage.nbytes()))
        return result


def born_in_two_steps(
    *, state_format: str, dtype: torch.dtype, projected: bool
) -> tuple[list[tuple[str, int]], int]:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in (LARGE, SMALL)]
    gradients = [torch.ones_like(parameter) for parameter in parameters]
    lift = Lift(torch.ones(72, 80, dtype=dtype), 64)
    low_rank = torch.ones(72, 64)
    projections = {parameters[0]: lift} if projected else {}
    optimizer = AdamW(parameters, **SETTINGS, state_format=state_format, projections=projections)
    for parameter, gradient in zip(parameters[projected:], gradients[projected:], strict=True):
        parameter.grad = gradient
    lift.low_rank = low_rank
    lift.apply = lambda weight, direction, **_: None  # type: ignore[method-assign]
    with _Born([*parameters, *gradients, low_rank]) as counter:
        optimizer.step()
        optimizer.step()
    state_bytes = sum(
        tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
    )
    return counter.born, state_bytes


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_format", list(STATE_FORMATS))
def test_a_fake_run_allocates_what_a_real_run_does(
    state_format: str, dtype: torch.dtype, projected: bool
) -> None:
    real = born_in_two_steps(state_format=state_format, dtype=dtype, projected=projected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = born_in_two_steps(state_format=state_format, dtype=dtype, projected=projected)
    assert fake == real
    born, state_bytes = real

    large = 72 * 64 if projected else 80 * 64
    bytes_an_element = {
        "float32": 8,
        "int8": 2 + 8 / 256,
        "fp8": 2 + 10 / 128,
        "int4": 1 + 8 / 128,
    }[state_format]
    assert state_bytes == large * bytes_an_element + 4 + (8 * 64 + 4)
    expected = state_bytes + (2048 if state_format == "int8" else 0)  # and the code maps
    if projected:
        expected += 2 * 4 * large  # two steps, a direction in each
    if dtype == torch.bfloat16:  # fp32 copies of parameter and gradient, and a step counter
        expected += 2 * (8 * 64 + 4)
        if state_format == "float32" and not projected:
            expected += 2 * (8 * large + 4)
    assert sum(num_bytes for _, num_bytes in born) == expected


def test_shared_tensors_are_the_code_maps() -> None:
    parameters = new_parameters([LARGE])
    optimizer = AdamW(parameters, state_format="int8")
    assert list(optimizer.shared_tensors()) == []
    train(optimizer, parameters, range(2))
    assert [tensor.shape for tensor in optimizer.shared_tensors()] == [(256,), (256,)]
