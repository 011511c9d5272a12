"""Adapters over packed weights, folded into them when the run ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memrt
from memrt.runner import model_loss
from memrt.strategies.peft import Peft
from memrt.testing import tiny_batches, tiny_model


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("targets", ["all-linear", ["attn.c_proj"]], ids=str)
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_adapters_over_packed_transposed_weights_are_folded_the_right_way(
    form: str, targets: Any, method: str
) -> None:
    """GPT-2's are [in, out]; a square one took ΔWᵀ without a word."""
    torch.manual_seed(0)
    model = tiny_model("gpt2", layers=2).train()
    options = {"feedforward_modules": []} if method == "ia3" else {"r": 4}
    config = {"peft_type": method.upper(), "target_modules": targets, **options}
    session = memrt.prepare(model, [form, Peft(config=config)], lr=3e-2)
    batch = tiny_batches("gpt2")[0]
    for _ in range(3):
        session.train_micro_batch(lambda: model_loss(model, batch))
        session.step()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        folded = session.export().eval()(**batch).logits
    assert torch.allclose(folded, expected, rtol=1e-4, atol=1e-5)
