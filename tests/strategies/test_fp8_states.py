"""FP8 optimizer state through a session: near fp32 AdamW, its bytes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memrt
from memrt.errors import ConflictError
from memrt.kernels.expanded_fp8 import num_groups
from memrt.optimizers.state_formats import MIN_QUANTIZED_ELEMENTS
from memrt.runner import model_loss
from memrt.session import Session
from tests.strategies.runs import assert_equal, batch_of, counted, model_of, states

HIDDEN = 64
"""Wide enough that embeddings and projections have 4096 elements or more."""


def _model(family: str = "llama", **overrides: Any) -> nn.Module:
    return model_of(family, hidden=HIDDEN, **overrides)


def _train(run: Session, family: str, *, first: int = 0, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        torch.manual_seed(500 + step)
        with run.micro_batch():
            loss = model_loss(run.model, batch_of(family, seed=step))
            run.backward(loss)
        losses.append(float(loss.detach()))
        run.step()
    return losses


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _expected_bytes(parameter: Tensor) -> int:
    n = parameter.numel()
    if n < MIN_QUANTIZED_ELEMENTS:
        return 8 * n + 4
    return 2 * n + 10 * num_groups(n) + 4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_stays_near_fp32_adamw(family: str) -> None:
    """A step is about lr wherever there is a gradient; FP8 moves its moments by percents."""
    plain, ours = _model(family), _model(family)
    exact = _train(memrt.prepare(plain, [], lr=1e-3), family, count=12)
    found = _train(memrt.prepare(ours, ["fp8_states"], lr=1e-3), family, count=12)
    assert found[0] == exact[0]
    assert found != exact  # otherwise nothing shows that FP8 is in use
    assert found[-1] == pytest.approx(exact[-1], rel=5e-3)
    start = _weights(_model(family))
    for name, weight in _weights(ours).items():
        moved = (_weights(plain)[name] - start[name]).norm()
        assert (weight - _weights(plain)[name]).norm() < 0.15 * moved, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_formula(dtype: torch.dtype) -> None:
    """2.08 bytes an element, 8 below 4096 elements, a step counter; counted by the ledger too."""
    model = _model(dtype=dtype)
    run = memrt.prepare(model, ["fp8_states"])
    _train(run, "llama", count=1)
    assert run.optimizer is not None
    found = states(run.optimizer, model)
    for name, parameter in model.named_parameters():
        own = sum(t.numel() * t.element_size() for t in found[name].values())
        assert own == _expected_bytes(parameter), name
    widest = max(model.parameters(), key=lambda p: p.numel())
    assert _expected_bytes(widest) / widest.numel() == pytest.approx(2.078, rel=1e-3)
    timeline = counted(_model(dtype=dtype), ["fp8_states"], [batch_of("llama")])
    expected = sum(_expected_bytes(p) for p in model.parameters())
    assert timeline.account_maxima()["optimizer"] == expected


def test_a_parked_state_keeps_its_codes() -> None:
    """Under LISA a layer that leaves takes its codes to the host and brings them back."""
    model = _model(layers=2)
    run = memrt.prepare(model, ["fp8_states", "lisa(layers=1, every=1, parked='host')"])
    assert run.optimizer is not None
    last: dict[str, dict[str, Tensor]] = {}
    returned = 0
    for step in range(12):
        run.begin_step()
        for name, state in states(run.optimizer, model).items():
            if name in last and ".layers." in name and "exp_avg_codes" in state:
                returned += 1
                assert_equal(state, last[name])
        _train(run, "llama", first=step, count=1)
        last.update(states(run.optimizer, model))
    assert returned > 20


def test_the_state_of_another_format_is_refused() -> None:
    plain, fp8 = memrt.prepare(_model(), []), memrt.prepare(_model(), ["fp8_states"])
    _train(plain, "llama", count=1)
    assert fp8.optimizer is not None
    assert plain.optimizer is not None
    with pytest.raises(ValueError, match="state_format"):
        fp8.optimizer.load_state_dict(plain.optimizer.state_dict())


def test_two_formats_and_other_update_rules_are_refused() -> None:
    with pytest.raises(ConflictError, match="fp8_states"):
        memrt.prepare(_model(), ["fp8_states", "int8_states"])
    model = _model()
    with pytest.raises(ConflictError, match=r"fp8_states: optimizer='SGD'.*use AdamW"):
        memrt.prepare(model, ["fp8_states"], optimizer=torch.optim.SGD(model.parameters()))


def test_on_cuda_it_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from memrt.strategies import fp8_states
    from memrt.structure import Facts, RunSettings, discover

    monkeypatch.setattr("memrt.state_format_strategy.find_spec", lambda name: None)
    model = _model()
    facts = Facts(model=model, structure=discover(model), settings=RunSettings())
    fp8_states.Fp8States().check(facts)  # not on the CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    with pytest.raises(ValueError, match="pip install triton"):
        fp8_states.Fp8States().check(facts)


def test_bf16_weights_are_rounded_stochastically_unless_told_otherwise() -> None:
    """With the run's seed; a wish that nothing could heed is refused."""
    groups = {}
    for wish in (None, True, False):
        model = _model(dtype=torch.bfloat16)
        run = memrt.prepare(model, ["fp8_states"], seed=7, stochastic_rounding=wish)
        assert run.optimizer is not None
        groups[wish] = run.optimizer.param_groups[0]
    assert [groups[wish]["stochastic_rounding"] for wish in groups] == [True, True, False]
    assert groups[None]["rounding_seed"] == 7
    with pytest.raises(ValueError, match="stochastic_rounding=True has no effect"):
        memrt.prepare(_model(), [], stochastic_rounding=True)
