"""A user's own optimizer beside strategies: it must hold what they add, or it trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memrt
from memrt.runner import model_loss
from memrt.testing import PlainModel, tiny_batches, tiny_model
from tests.trainer_runs import model_of, trainer_of, weights

ADDING = ["peft", "ladder(reduction=2)"]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}


@pytest.mark.parametrize("spec", ADDING)
def test_an_optimizer_of_before_is_refused_by_a_plain_loop(spec: str) -> None:
    model = tiny_model("llama").train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"AdamW was made before .*run\.adopt_optimizer with it"):
        memrt.prepare(model, [spec], optimizer=adamw(model))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names  # undone

    run = memrt.prepare(model, [spec])  # what the refusal advises
    run.adopt_optimizer(adamw(model))
    before = copies(model)
    for batch in tiny_batches("llama", count=2):
        with run.micro_batch(last=True):
            run.backward(model_loss(model, batch))
        run.step()
    assert moved(model, before)


@pytest.mark.parametrize("spec", ADDING)
def test_an_optimizer_of_before_is_refused_by_a_trainer(spec: str, tmp_path: Path) -> None:
    model = model_of("llama")
    given = {"strategies": [spec], "optimizers": (adamw(model), None)}
    with pytest.raises(ValueError, match=r"AdamW was made before .*as optimizer_cls_and_kwargs"):
        trainer_of(tmp_path, model=model, options=given)

    advised: dict[str, Any] = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-2})}
    trainer = trainer_of(tmp_path, model=model, options={"strategies": [spec], **advised})
    before = weights(trainer)
    trainer.train()
    assert moved(trainer.model, before)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = PlainModel()
    with pytest.raises(ValueError, match=r"AdamW holds none of the \d+ parameters that train;"):
        memrt.prepare(model, optimizer=adamw(PlainModel()))


def test_parameters_may_be_left_out_on_purpose() -> None:
    model = PlainModel()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    assert memrt.prepare(model, ["activation_checkpoint"], optimizer=optimizer).optimizer
