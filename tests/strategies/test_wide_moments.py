"""Heads of bf16 beside adapters: fp32 moments, which torch's AdamW would not give them."""

from __future__ import annotations

import pytest
import torch

import memrt
from memrt.optimizers.adamw import AdamW
from memrt.registry import parse_all
from memrt.runner import model_loss
from memrt.session import Session
from memrt.structure import RunSettings
from tests.strategies.active_runs import ideal_bytes, state_bytes, trainable
from tests.strategies.runs import batch_of, model_of


def test_a_bf16_head_beside_peft_has_fp32_moments() -> None:
    """The bytes of fp32 moments, and updates of a fraction of bf16's spacing arrive."""
    model = model_of("llama", dtype=torch.bfloat16)
    spec = "peft(rank=4, options={'modules_to_save': ['lm_head']})"
    run = memrt.prepare(model, [spec], lr=1e-5)
    assert isinstance(run.optimizer, AdamW)
    heads = [p for p in model.parameters() if p.requires_grad and p.dtype is torch.bfloat16]
    (head,) = heads
    torch.nn.init.constant_(head, 1.5)
    for _ in range(3):
        with run.micro_batch():
            run.backward(model_loss(model, batch_of("llama")))
        run.step()
    state = run.optimizer.state[head]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert state_bytes(run.optimizer) == ideal_bytes(model, trainable(model))
    assert (head != 1.5).any()


def test_such_a_head_is_refused_where_parameters_are_split() -> None:
    """That it trains in bf16 is known only when the adapters are there."""
    model = model_of("llama", dtype=torch.bfloat16)
    spec = "peft(rank=4, options={'modules_to_save': ['lm_head']})"
    run = Session(model, parse_all([spec]), settings=RunSettings(sharded="fsdp"))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"fsdp exchanges .* let what trains be fp32"):
        run.build_optimizer([{"params": named}])


def test_adapters_of_fp32_keep_torchs_adamw() -> None:
    run = memrt.prepare(model_of("llama"), ["peft(rank=4)"])
    assert type(run.optimizer) is torch.optim.AdamW
