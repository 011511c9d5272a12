"""4-bit optimizer state through a session: near fp32 AdamW, its bytes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import memrt
from memrt.errors import ConflictError
from memrt.kernels.adamw_step import num_groups
from memrt.optimizers.state_formats import MIN_QUANTIZED_ELEMENTS
from memrt.runner import model_loss
from memrt.session import Session
from tests.strategies.runs import batch_of, counted, model_of, states


def _model(family: str = "llama", **overrides: Any) -> nn.Module:
    return model_of(family, hidden=64, **overrides)


def _train(run: Session, family: str, *, count: int) -> list[float]:
    losses = []
    for step in range(count):
        torch.manual_seed(500 + step)
        with run.micro_batch():
            loss = model_loss(run.model, batch_of(family, seed=step))
            run.backward(loss)
        losses.append(float(loss.detach()))
        run.step()
    return losses


def _expected_bytes(parameter: nn.Parameter) -> int:
    n = parameter.numel()
    if n < MIN_QUANTIZED_ELEMENTS:
        return 8 * n + 4
    return 2 * ((n + 1) // 2) + 8 * num_groups(n) + 4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_stays_near_fp32_adamw(family: str) -> None:
    """Most of a step is the sign of a gradient: the loss follows within percents."""
    exact = _train(memrt.prepare(_model(family), [], lr=1e-3), family, count=12)
    found = _train(memrt.prepare(_model(family), ["int4_states"], lr=1e-3), family, count=12)
    assert found[0] == exact[0]
    assert found != exact  # otherwise nothing shows that 4 bits are in use
    assert found[-1] == pytest.approx(exact[-1], rel=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_formula(dtype: torch.dtype) -> None:
    """1.06 bytes an element, 8 below 4096 elements, a step counter; counted by the ledger too."""
    model = _model(dtype=dtype)
    run = memrt.prepare(model, ["int4_states"])
    _train(run, "llama", count=1)
    assert run.optimizer is not None
    found = states(run.optimizer, model)
    for name, parameter in model.named_parameters():
        own = sum(t.numel() * t.element_size() for t in found[name].values())
        assert own == _expected_bytes(parameter), name
    widest = max(model.parameters(), key=lambda p: p.numel())
    assert _expected_bytes(widest) / widest.numel() == pytest.approx(1.0625, rel=1e-3)
    timeline = counted(_model(dtype=dtype), ["int4_states"], [batch_of("llama")])
    expected = sum(_expected_bytes(p) for p in model.parameters())
    assert timeline.account_maxima()["optimizer"] == expected


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from memrt.strategies import int4_states
    from memrt.structure import Facts, RunSettings, discover

    with pytest.raises(ConflictError, match="int4_states"):
        memrt.prepare(_model(), ["int4_states", "fp8_states"])
    model = _model()
    with pytest.raises(ConflictError, match=r"int4_states: optimizer='SGD'.*use AdamW"):
        memrt.prepare(model, ["int4_states"], optimizer=torch.optim.SGD(model.parameters()))
    facts = Facts(model=model, structure=discover(model), settings=RunSettings())
    monkeypatch.setattr("memrt.state_format_strategy.find_spec", lambda name: None)
    int4_states.Int4States().check(facts)  # the CPU needs no Triton
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    with pytest.raises(ValueError, match="pip install triton"):
        int4_states.Int4States().check(facts)
