"""Every strategy under the Trainer: training, saving, order of calls, over other trainers."""

from __future__ import annotations

import math
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import memrt
from memrt import MemoryMixin, registry
from memrt.adapters import has_adapter_files
from memrt.errors import ConflictError
from memrt.ladder.files import has_ladder_files
from memrt.testing import FAMILIES
from tests.contract import SPECS, refusal, specs
from tests.trainer_runs import (
    assert_equal,
    examples,
    history,
    model_of,
    run,
    trainer_of,
    weights,
)
from tests.trainer_stubs import Watch

LISA = "lisa(layers=1, every=2)"
SAVING = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", registry.names())
def test_every_strategy_trains_evaluates_predicts_and_saves(
    name: str, family: str, tmp_path: Path
) -> None:
    trainer = trainer_of(
        tmp_path,
        family=family,
        options={"strategies": specs([name]), "eval_dataset": examples(family)[:4]},
        eval_strategy="steps",
        eval_steps=3,
        max_steps=8,
        learning_rate=1e-2,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in history(trainer) if "loss" in entry]
    assert all(map(math.isfinite, losses))
    assert trainer.evaluate()["eval_loss"] < before
    logits = trainer.predict(examples(family)[:4]).predictions
    trainer.save_model()
    assert not list(tmp_path.glob("memrt_state*"))
    if has_adapter_files(tmp_path):  # adapters alone, which tests/strategies/test_peft.py loads
        assert not (tmp_path / "model.safetensors").exists()
        return
    if has_ladder_files(tmp_path):  # the side network alone
        assert not (tmp_path / "model.safetensors").exists()
        loaded = model_of(family)
        memrt.load_ladder(loaded, tmp_path)
    else:
        loaded = type(model_of(family)).from_pretrained(tmp_path)
        assert_equal(loaded.state_dict(), weights(trainer))
        assert loaded.config.architectures == [type(model_of(family)).__name__]
    plain = trainer_of(tmp_path / "plain", family=family, model=loaded)
    assert torch.equal(
        torch.as_tensor(plain.predict(examples(family)[:4]).predictions), torch.as_tensor(logits)
    )


@pytest.mark.parametrize("name", registry.names())
def test_preparing_the_optimizer_again_changes_no_bit(name: str, tmp_path: Path) -> None:
    """accelerate loads every optimizer's own state dict into it when it wraps it."""
    trainer = run(tmp_path, options={"strategies": specs([name])}, max_steps=3)
    raw = trainer.session.optimizer
    copies = {p: {k: _copy(v) for k, v in state.items()} for p, state in raw.state.items()}
    accelerator = trainer.accelerator
    accelerator.free_memory()
    wrapped = accelerator.prepare(raw)
    assert wrapped.optimizer is raw
    assert raw.state.keys() == copies.keys()
    for parameter, state in copies.items():
        assert raw.state[parameter].keys() == state.keys()
        for key, value in state.items():
            after = raw.state[parameter][key]
            assert not isinstance(value, Tensor) or value.dtype == after.dtype
            assert torch.equal(torch.as_tensor(after), torch.as_tensor(value))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_families_are_refused_by_the_trainer_too(family: str, tmp_path: Path) -> None:
    reason = refusal(family, [SPECS["fused_loss"]])
    if reason is None:
        assert trainer_of(tmp_path, family=family, options={"strategies": ["fused_loss"]}).session
    else:
        with pytest.raises(ConflictError):
            trainer_of(tmp_path, family=family, options={"strategies": ["fused_loss"]})


def test_strategies_are_called_once_a_step_and_know_the_last_micro_batch(tmp_path: Path) -> None:
    """12 micro-batches an epoch in windows of 5: the third window has two."""
    trainer = run(
        tmp_path,
        options={"strategies": [Watch()]},
        gradient_accumulation_steps=5,
        max_steps=-1,
        num_train_epochs=1,
    )
    window = ["micro"] * 4 + ["last"]
    assert trainer.session.attachments[0].calls == [
        "before 0", *window, "after 0", "before 1", *window, "after 1",
        "before 2", "micro", "last", "after 2",
    ]  # fmt: skip


def test_user_callbacks_see_what_is_active_in_this_step(tmp_path: Path) -> None:
    seen: list[tuple[bool, ...]] = []

    class See(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(tuple(p.requires_grad for p in kwargs["model"].parameters()))

    run(tmp_path, options={"strategies": [LISA], "callbacks": [See()]})
    assert all(not all(step) for step in seen)
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert len(set(seen)) > 1


def test_no_callback_without_strategies(tmp_path: Path) -> None:
    ours = [type(c) for c in trainer_of(tmp_path).callback_handler.callbacks]
    theirs = trainer_of(tmp_path, cls=transformers.Trainer).callback_handler.callbacks
    assert ours == [type(c) for c in theirs]
    assert trainer_of(tmp_path).session is None


def test_an_exception_leaves_a_trainer_that_can_train(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        options={"strategies": [SPECS["galore"], Watch()]},
        gradient_accumulation_steps=3,
    )
    compute, count = trainer.compute_loss, [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 5:  # the second micro-batch of the second step
            raise KeyboardInterrupt
        return compute(*args, **kwargs)

    trainer.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    calls = trainer.session.attachments[0].calls
    assert calls[-2:] == ["before 1", "micro"]
    trainer.train()
    assert calls[7:9] == ["after 1", "before 1"]
    assert trainer.session.step_index == 1 + 6


def test_training_twice_goes_on(tmp_path: Path) -> None:
    trainer = run(tmp_path, options={"strategies": [LISA]}, max_steps=3)
    optimizer = trainer.session.optimizer
    trainer.train()
    assert trainer.session.optimizer is optimizer
    assert trainer.session.step_index == 6
    ends = []
    for strategies in ([], ["activation_checkpoint"]):
        trainer = run(tmp_path, options={"strategies": strategies}, max_steps=3)
        trainer.train()
        ends.append(weights(trainer))
    assert_equal(*ends)


def test_a_model_that_another_trainer_wrapped_for_bf16_is_served(tmp_path: Path) -> None:
    ends = []
    for wrapped in (True, False):
        model = model_of("llama")
        if wrapped:
            run(tmp_path, cls=transformers.Trainer, model=model, bf16=True, learning_rate=0.0)
            assert "forward" in vars(model)
        options = {"strategies": [SPECS["fused_loss"]]}
        ends.append(weights(run(tmp_path, model=model, options=options, bf16=True, max_steps=2)))
    assert_equal(*ends)


def test_a_model_made_anew_gets_the_strategies_again(tmp_path: Path) -> None:
    """As in a search for hyperparameters: every train() has a new model and may have new values."""
    trainer = memrt.Trainer(
        model_init=lambda: model_of("llama"),
        args=trainer_of(tmp_path).args,
        train_dataset=examples("llama"),
        strategies=[LISA, "int8_states"],
    )
    first = trainer.session
    trainer.train()
    second = trainer.session
    assert second is not first
    assert second.model is trainer.model
    assert second.step_index == 6
    once = weights(trainer)
    trainer.args.learning_rate = 1e-2
    trainer.train()
    assert trainer.session.facts.settings.learning_rate == 1e-2
    assert trainer.session.optimizer.defaults["lr"] == 1e-2
    assert any(not torch.equal(once[name], value) for name, value in weights(trainer).items())


class Theirs(transformers.Trainer):  # type: ignore[misc]
    """Somebody's Trainer: replaces forward on the instance, computes the loss, saves more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inner = self.model.forward
        self.model.forward = wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        (folder / "theirs.txt").write_text("more")


class Both(MemoryMixin, Theirs):
    pass


def test_the_mixin_works_over_somebody_s_trainer(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"arguments_cls": transformers.TrainingArguments, **SAVING}
    theirs = run(tmp_path / "theirs", cls=Theirs, **settings)
    ours = run(tmp_path / "ours", cls=Both, **settings)
    assert_equal(weights(ours), weights(theirs))
    assert (tmp_path / "ours/checkpoint-3/theirs.txt").is_file()
    switching = run(tmp_path / "lisa", cls=Both, options={"strategies": [LISA]}, **settings)
    again = run(
        tmp_path / "again",
        cls=Both,
        options={"strategies": [LISA]},
        resume=str(tmp_path / "lisa/checkpoint-3"),
        **settings,
    )
    assert_equal(weights(again), weights(switching))
    with pytest.raises(ConflictError, match="replaced on this instance"):
        trainer_of(tmp_path, cls=Both, options={"strategies": ["fused_loss"]})
