"""Losses, owned backward, hidden gradients, probing and losses that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor

import memrt
from memrt import MemoryMixin
from memrt.errors import ConflictError, NonFiniteLossError
from tests.contract import SPECS
from tests.trainer_runs import (
    assert_equal,
    examples,
    history,
    run,
    trainer_of,
    weights,
)
from tests.trainer_stubs import Backward, Hide, Poison, Probe

LISA = "lisa(layers=1, every=2)"
SAVING = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("family", ["llama", "plain"])
def test_a_strategy_that_owns_backward_sees_the_trainer_s_loss(family: str, tmp_path: Path) -> None:
    """Llama divides by the step's tokens itself, the plain module leaves it to the Trainer."""
    settings: dict[str, Any] = {"family": family, "gradient_accumulation_steps": 5}
    plain = run(tmp_path, **settings)
    ours = run(tmp_path, options={"strategies": [Backward()]}, **settings)
    assert history(ours) == history(plain)
    assert_equal(weights(ours), weights(plain))


class Counting(transformers.Trainer):  # type: ignore[misc]
    """Counts its micro-batches, as GRPO does."""

    count = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.count += 1
        return loss


@pytest.mark.parametrize(("name", "window"), [("in_backward", 2), ("lomo", 1)])
def test_a_trainer_s_own_step_runs_where_a_strategy_owns_backward(
    name: str, window: int, tmp_path: Path
) -> None:
    """With the numbers of one pass, where nothing is clipped."""
    cls = type("Mixed", (MemoryMixin, Counting), {})
    settings: dict[str, Any] = {
        "cls": cls,
        "family": "plain",
        "gradient_accumulation_steps": window,
    }
    runs = [
        run(tmp_path, options={"strategies": [spec]}, max_grad_norm=norm, **settings)
        for spec, norm in ((name, 0.0), (f"{name}(clip='two_pass')", 1e6))
    ]
    assert [trainer.count for trainer in runs] == [6 * window, 6 * window]
    assert_equal(weights(runs[1]), weights(runs[0]))
    assert "backward" not in vars(runs[1].accelerator)


def test_a_trainer_s_own_step_is_refused_where_a_strategy_owns_forward(tmp_path: Path) -> None:
    cls = type("Mixed", (MemoryMixin, Counting), {})
    with pytest.raises(ConflictError, match="Counting has a training_step of its own"):
        trainer_of(tmp_path, cls=cls, options={"strategies": [Backward()]})


def test_a_loss_of_the_user_s_goes_through_an_owned_backward(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return total / num_items_in_batch

    settings: dict[str, Any] = {"gradient_accumulation_steps": 5, "max_steps": 3}
    plain = run(tmp_path, options={"compute_loss_func": loss}, **settings)
    ours = run(
        tmp_path, options={"compute_loss_func": loss, "strategies": [Backward()]}, **settings
    )
    assert history(ours) == history(plain)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.25, 100.0])
def test_hidden_gradients_are_clipped_and_logged_under_their_own_name(
    max_grad_norm: float, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_grad_norm": max_grad_norm, "max_steps": 3}
    plain = run(tmp_path, **settings)
    ours = run(tmp_path, options={"strategies": [Hide()]}, **settings)
    for one, other in zip(history(ours)[:-1], history(plain)[:-1], strict=True):
        assert "grad_norm" not in one
        # two fp32 sums over some 40 000 squares, in another order
        assert one.pop("grad_norm_hidden") == pytest.approx(other.pop("grad_norm"), rel=1e-5)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert list(one) == list(other)
    for name, value in weights(plain).items():
        # AdamW's steps of 1e-3; a clipping factor that is off by 1e-6 moves them far less
        assert torch.allclose(weights(ours)[name], value, rtol=0, atol=1e-5), name


def test_a_true_norm_keeps_its_name(tmp_path: Path) -> None:
    trainer = run(tmp_path, options={"strategies": [LISA]}, max_steps=1)
    assert "grad_norm" in history(trainer)[0]
    projected = run(tmp_path, options={"strategies": [SPECS["galore"]]}, max_steps=1)
    assert "grad_norm_projected" in history(projected)[0]
    assert "grad_norm" not in history(projected)[0]


def test_probing_advances_no_random_number_and_no_loader(tmp_path: Path) -> None:
    rows = examples("gpt2", count=40)[24:]

    def masking(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        torch.rand(3)  # as a collator does that masks at random
        batch: dict[str, Tensor] = transformers.default_data_collator(features)
        return batch

    plain = run(tmp_path, family="gpt2", options={"data_collator": masking})
    options = {"strategies": [Probe()], "probe_dataset": rows, "data_collator": masking}
    ours = run(tmp_path, family="gpt2", options=options)
    assert history(ours) == history(plain)
    assert_equal(weights(ours), weights(plain))
    assert len(ours.session.attachments[0].losses) == 2
    with pytest.raises(ValueError, match="there is none"):
        trainer_of(tmp_path, options={"probe_dataset": rows})
    short = trainer_of(tmp_path, options={"strategies": [Probe()], "probe_dataset": rows[:8]})
    with pytest.raises(ValueError, match="has 1 batches, 2 are needed"):
        short.train()
    without = trainer_of(tmp_path, options={"strategies": [Probe()]})
    with pytest.raises(ValueError, match="probe_dataset"):
        without.train()


@pytest.mark.parametrize("strategies", [[], [LISA]], ids=["plain", "lisa"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(
    value: float, strategies: list[str], tmp_path: Path
) -> None:
    options = {"strategies": strategies, "callbacks": [Poison(value, 4)]}
    trainer = trainer_of(tmp_path, options=options, **SAVING)
    with pytest.raises(NonFiniteLossError, match=r"optimizer step 5.*checkpoint-3") as caught:
        trainer.train()
    assert isinstance(caught.value, FloatingPointError)
    assert caught.value.checkpoint == str(tmp_path / "checkpoint-3")
    assert trainer.state.global_step == 4
    bad = [name for name, t in weights(trainer).items() if not torch.isfinite(t).all()]
    assert bad == ["lm_head.weight"]  # the poison only: nothing was updated with it


@pytest.mark.parametrize("spec", ["in_backward", "in_backward(clip='two_pass')"])
def test_it_stops_before_an_update_in_backward(spec: str, tmp_path: Path) -> None:
    """Gradients that are finite all the same would have been applied, and moved the momentum."""

    class Masked(memrt.Trainer):
        before: ClassVar[dict[str, Tensor]] = {}

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step < 1:
                return loss
            self.before.update(weights(self))
            return loss * 0.0 + math.nan

    norm = 1.0 if "two_pass" in spec else 0.0
    options = {"strategies": [spec]}
    trainer = trainer_of(tmp_path, family="plain", cls=Masked, options=options, max_grad_norm=norm)
    with pytest.raises(NonFiniteLossError, match="step 2; the step was not applied"):
        trainer.train()
    assert_equal(weights(trainer), trainer.before)


def test_without_a_checkpoint_of_this_run_none_is_named(tmp_path: Path) -> None:
    run(tmp_path, **SAVING)
    trainer = trainer_of(tmp_path, options={"callbacks": [Poison(math.nan, 1)]})
    with pytest.raises(NonFiniteLossError, match="none is saved yet"):
        trainer.train()
    resumed = trainer_of(tmp_path, options={"callbacks": [Poison(math.nan, 3)]})
    with pytest.raises(NonFiniteLossError, match="checkpoint-3"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_loss_that_was_never_finite_is_not_blamed_on_the_learning_rate(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    for row in trainer.train_dataset:
        row["labels"].fill_(-100)
    with pytest.raises(NonFiniteLossError, match=r"step 1, before anything was updated") as caught:
        trainer.train()
    assert "labels are all -100" in str(caught.value)
    assert "Lower the learning rate" not in str(caught.value)


@pytest.mark.parametrize("how", ["argument", "transformers"])
def test_it_can_be_left_on_as_in_transformers(how: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"stop_on_nonfinite": False}
    if how == "transformers":
        arguments = {"arguments_cls": transformers.TrainingArguments}
    trainer = run(tmp_path, options={"callbacks": [Poison(math.nan, 1)]}, **arguments)
    assert trainer.state.global_step == 6
