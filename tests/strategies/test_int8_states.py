"""8-bit optimizer state through a session: bitsandbytes' codes, its bytes, and exact resume."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memrt
from memrt.errors import ConflictError
from memrt.kernels.dynamic_map import BLOCK_SIZE, num_blocks
from memrt.optimizers.state_formats import MIN_QUANTIZED_ELEMENTS
from memrt.runner import model_loss
from memrt.session import Session
from tests.strategies.runs import assert_equal, batch_of, counted, model_of, states

HIDDEN = 64
"""Wide enough that embeddings and projections have 4096 elements or more."""
MAP_BYTES = 2 * 256 * 4


def _model(family: str = "llama", **overrides: Any) -> nn.Module:
    return model_of(family, hidden=HIDDEN, **overrides)


def _train(run: Session, family: str, *, first: int = 0, count: int) -> None:
    for step in range(first, first + count):
        torch.manual_seed(500 + step)
        with run.micro_batch():
            run.backward(model_loss(run.model, batch_of(family, seed=step)))
        run.step()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _is_int8(parameter: Tensor) -> bool:
    return parameter.numel() >= MIN_QUANTIZED_ELEMENTS


def _expected_bytes(parameter: Tensor) -> int:
    if not _is_int8(parameter):
        return 8 * parameter.numel() + 4
    return 2 * parameter.numel() + 2 * 4 * num_blocks(parameter.numel()) + 4


# ---------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_step_is_that_of_bitsandbytes(family: str, weight_decay: float) -> None:
    """From equal weights and states: the same codes and scales, and the same bits of the weights.

    But for one thing: the code of a second moment is 1 at least, or an update could be divided by
    eps alone. Where bitsandbytes keeps fp32 moments its kernel rounds in another order than
    torch's; the update is at most lr / sqrt(1 - beta2), of which a few fp32 roundings differ.
    """
    from bitsandbytes.optim import AdamW8bit

    plain, model = _model(family), _model(family)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": weight_decay}
    optimizer = AdamW8bit(plain.parameters(), **options)
    run = memrt.prepare(model, ["int8_states"], **options)
    assert run.optimizer is not None
    for step in range(6):
        plain.load_state_dict(model.state_dict())
        torch.manual_seed(500 + step)
        model_loss(plain, batch_of(family, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        _train(run, family, first=step, count=1)
        compared = 0
        for theirs, ours in zip(plain.parameters(), model.parameters(), strict=True):
            state, expected = run.optimizer.state[ours], optimizer.state[theirs]
            if not _is_int8(ours):
                torch.testing.assert_close(ours, theirs, rtol=4 * 2**-24, atol=8 * 2**-24 * 0.1)
                continue
            compared += 1
            assert torch.equal(ours, theirs)
            assert torch.equal(state["exp_avg_codes"], expected["state1"])
            assert torch.equal(state["exp_avg_sq_codes"], expected["state2"].clamp_(min=1))
            assert torch.equal(state["exp_avg_scales"], expected["absmax1"])
            assert torch.equal(state["exp_avg_sq_scales"], expected["absmax2"])
        assert compared >= 10


def test_it_is_not_fp32_adamw() -> None:
    """Otherwise nothing above would show that 8 bits are in use."""
    one, other = _model(), _model()
    for model, stack in ((one, []), (other, ["int8_states"])):
        _train(memrt.prepare(model, stack, lr=1e-2), "llama", count=3)
    wide = "lm_head.weight"
    assert not torch.equal(_weights(one)[wide], _weights(other)[wide])
    distance = (_weights(one)[wide] - _weights(other)[wide]).abs().max()
    assert float(distance) < 3 * 1e-2  # of three steps of at most lr


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_formula(family: str, dtype: torch.dtype) -> None:
    """2 bytes and two fp32 scales a block of 256; 8 bytes below 4096 elements; a step counter."""
    model = _model(family, dtype=dtype)
    run = memrt.prepare(model, ["int8_states"])
    _train(run, family, count=1)
    assert run.optimizer is not None
    found = states(run.optimizer, model)
    assert found.keys() == _weights(model).keys()
    for name, parameter in model.named_parameters():
        own = sum(t.numel() * t.element_size() for t in found[name].values())
        assert own == _expected_bytes(parameter), name
        dtypes = {key: tensor.dtype for key, tensor in found[name].items()}
        codes = [key for key, kind in dtypes.items() if kind is torch.uint8]
        assert len(codes) == (2 if _is_int8(parameter) else 0)
        assert set(dtypes.values()) <= {torch.uint8, torch.float32}
    widest = max(model.parameters(), key=lambda p: p.numel())
    assert _expected_bytes(widest) / widest.numel() == pytest.approx(
        2 * (1 + 4 / BLOCK_SIZE), rel=1e-3
    )


def test_the_ledger_counts_the_same_bytes() -> None:
    model = _model()
    expected = sum(_expected_bytes(p) for p in model.parameters()) + MAP_BYTES
    timeline = counted(model, ["int8_states"], [batch_of("llama")])
    assert timeline.account_maxima()["optimizer"] == expected
    plain = counted(_model(), [], [batch_of("llama")]).account_maxima()["optimizer"]
    assert expected < 0.4 * plain  # a few small tensors and the maps weigh here


def test_a_parked_state_stays_in_8_bits() -> None:
    """Under LISA a layer that leaves takes its codes to the host and brings them back."""
    model = _model(layers=2)
    run = memrt.prepare(model, ["int8_states", "lisa(layers=1, every=1, parked='host')"])
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
    parked = run.state_dict()["parked"]
    assert {t.dtype for entry in parked.values() for t in entry["state"].values()} == {
        torch.uint8,
        torch.float32,
    }


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_equals_the_uninterrupted_run(dtype: torch.dtype) -> None:
    """torch's own loading would cast codes and moments to the parameter's dtype."""
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0}
    whole = memrt.prepare(_model(dtype=dtype), ["int8_states"], **options)
    _train(whole, "llama", count=6)
    stopped = memrt.prepare(_model(dtype=dtype), ["int8_states"], **options)
    _train(stopped, "llama", count=3)
    buffer = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "run": stopped.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    resumed = memrt.prepare(_model(seed=9, dtype=dtype), ["int8_states"], **options)
    resumed.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["run"])
    _train(resumed, "llama", first=3, count=3)
    assert_equal(_weights(resumed.model), _weights(whole.model))
    assert resumed.optimizer is not None
    assert whole.optimizer is not None
    ours, theirs = (
        states(resumed.optimizer, resumed.model),
        states(whole.optimizer, whole.model),
    )
    for name in theirs:
        assert_equal(ours[name], theirs[name])


def test_the_state_of_fp32_adamw_is_refused() -> None:
    plain, int8 = memrt.prepare(_model(), []), memrt.prepare(_model(), ["int8_states"])
    _train(plain, "llama", count=1)
    assert int8.optimizer is not None
    assert plain.optimizer is not None
    with pytest.raises(ValueError, match="state_format"):
        int8.optimizer.load_state_dict(plain.optimizer.state_dict())


# ---------------------------------------------------------------- bf16 and refusals


def test_a_bf16_model_takes_the_same_steps_as_an_fp32_copy_rounded_once() -> None:
    model = _model(dtype=torch.bfloat16)
    run = memrt.prepare(
        model, ["int8_states"], lr=1e-2, weight_decay=0.1, stochastic_rounding=False
    )
    name = "lm_head.weight"
    weight = model.get_parameter(name)
    shadow = nn.Parameter(torch.empty(weight.shape))
    from memrt.optimizers.adamw import AdamW

    reference = AdamW([shadow], lr=1e-2, weight_decay=0.1, state_format="int8")
    for step in range(4):
        with torch.no_grad():
            shadow.copy_(weight)
        with run.micro_batch():
            run.backward(model_loss(model, batch_of("llama", seed=step)))
        assert weight.grad is not None
        shadow.grad = weight.grad.float()
        run.step()
        reference.step()
        assert torch.equal(weight, shadow.bfloat16())


def test_another_update_rule_is_refused() -> None:
    model = _model()
    with pytest.raises(ConflictError, match=r"int8_states: optimizer='SGD'.*use AdamW"):
        memrt.prepare(model, ["int8_states"], optimizer=torch.optim.SGD(model.parameters()))


def test_without_bitsandbytes_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memrt.strategies.int8_states.find_spec", lambda name: None)
    with pytest.raises(ConflictError, match="pip install bitsandbytes"):
        memrt.prepare(_model(), ["int8_states"])
