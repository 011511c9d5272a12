"""Strategies under the Trainer: settings, order of calls, norms, backward, evaluation, saving."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor

import memrt
from memrt import MemoryMixin, registry
from memrt.errors import ConflictError, NonFiniteLossError
from memrt.session import Session
from memrt.strategy import Attachment, Claim, Phase, Rule, Slot, Strategy
from memrt.structure import Facts, RunSettings
from memrt.testing import FAMILIES
from tests.contract import SPECS, refusal
from tests.trainer_runs import (
    assert_equal,
    examples,
    history,
    model_of,
    run,
    trainer_of,
    weights,
)

LISA = "lisa(layers=1, every=2)"
SAVING = {"save_strategy": "steps", "save_steps": 3}


# -------------------------------------------------------------------- small strategies


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch(Strategy):
    """Writes down what the session calls."""

    name: ClassVar[str] = "watch"

    def attach(self, run: Session) -> Attachment:
        return Watching(self, run)


class Watching(Attachment):
    def __init__(self, settings: Strategy, run: Session) -> None:
        super().__init__(settings, run)
        self.calls: list[str] = []

    def before_step(self, step: int) -> None:
        self.calls.append(f"before {step}")

    def after_step(self, step: int) -> None:
        self.calls.append(f"after {step}")

    @contextmanager
    def around_micro_batch(self) -> Iterator[None]:
        yield
        self.calls.append("last" if self.run.last_micro_batch else "micro")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward(Strategy):
    """Owns backward and does there what autograd does."""

    name: ClassVar[str] = "own_backward"

    def claims(self, facts: Facts) -> list[Claim]:
        return [Claim(slot=Slot.BACKWARD)]

    def attach(self, run: Session) -> Attachment:
        return OwnBackward(self, run)


class OwnBackward(Attachment):
    def micro_batch(self, forward: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            forward()  # as a method does that needs the loss twice
        loss = forward()
        loss.backward()
        return loss.detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hide(Strategy):
    """Keeps every other gradient outside `.grad` until the optimizer steps."""

    name: ClassVar[str] = "hide"

    def attach(self, run: Session) -> Attachment:
        return Hiding(self, run)


class Hiding(Attachment):
    norm_kind = "hidden"

    def __init__(self, settings: Strategy, run: Session) -> None:
        super().__init__(settings, run)
        self.hidden: dict[torch.nn.Parameter, Tensor] = {}
        self._hooked = False

    def before_step(self, step: int) -> None:
        if not self._hooked:
            assert self.run.optimizer is not None
            self.run.optimizer.register_step_pre_hook(lambda *_: self._give_back())
            self._hooked = True

    def _give_back(self) -> None:
        for parameter, gradient in self.hidden.items():
            parameter.grad = gradient
        self.hidden = {}

    @contextmanager
    def around_micro_batch(self) -> Iterator[None]:
        yield
        if self.run.last_micro_batch:
            for parameter in list(self.run.model.parameters())[::2]:
                assert parameter.grad is not None
                self.hidden[parameter], parameter.grad = parameter.grad, None

    def squared_gradient_norm(self) -> Tensor | None:
        return torch.stack([g.square().sum() for g in self.hidden.values()]).sum()

    def scale_gradients(self, factor: Tensor) -> None:
        for gradient in self.hidden.values():
            gradient.mul_(factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bring(Strategy):
    """Brings a part of the optimizer."""

    name: ClassVar[str] = "bring"
    phase: ClassVar[Phase] = Phase.UPDATE

    def attach(self, run: Session) -> Attachment:
        return Bringing(self, run)


class Bringing(Attachment):
    def rules(self) -> list[Rule]:
        return [
            Rule(
                slot=Slot.STATE_FORMAT,
                match=lambda name, parameter: True,
                build=lambda name, parameter: "float32",
            )
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Strategy):
    """Looks at held-out data before every step."""

    name: ClassVar[str] = "probing"

    def attach(self, run: Session) -> Attachment:
        return Probing(self, run)


class Probing(Attachment):
    losses: list[float]

    def before_step(self, step: int) -> None:
        self.losses = [self.run.loss(batch).item() for batch in self.run.probe(2)]


# -------------------------------------------------------------------- every registered strategy


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", registry.names())
def test_every_strategy_trains_evaluates_predicts_and_saves(
    name: str, family: str, tmp_path: Path
) -> None:
    trainer = trainer_of(
        tmp_path,
        family=family,
        options={"strategies": [SPECS[name]], "eval_dataset": examples(family)[:4]},
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
    trainer = run(tmp_path, options={"strategies": [SPECS[name]]}, max_steps=3)
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


# -------------------------------------------------------------------- settings and conflicts


def test_the_arguments_become_the_run_s_settings(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        options={"strategies": [LISA]},
        learning_rate=3e-4,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-6,
        weight_decay=0.1,
        max_grad_norm=0.5,
        gradient_accumulation_steps=3,
        activation_checkpointing=True,
        label_smoothing_factor=0.2,
        seed=5,
    )
    assert trainer.session.facts.settings == RunSettings(
        learning_rate=3e-4,
        betas=(0.8, 0.9),
        epsilon=1e-6,
        weight_decay=0.1,
        max_grad_norm=0.5,
        accumulation_steps=3,
        gradient_checkpointing=True,
        label_smoothing=0.2,
        seed=5,
    )


@pytest.mark.parametrize(
    ("optim", "name"),
    [("adamw_torch", "adamw"), ("adamw_torch_fused", "adamw"), ("adafactor", "adafactor")],
)
def test_the_optimizer_s_name_reaches_the_strategies(optim: str, name: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, options={"strategies": [LISA]}, optim=optim)
    assert trainer.session.facts.settings.optimizer == name


def test_several_devices_processes_and_custom_losses_reach_the_strategies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(
        tmp_path,
        options={"strategies": [LISA], "compute_loss_func": lambda *_, **__: None},
    )
    assert trainer._run_settings().custom_loss
    trainer.args._n_gpu = 2
    assert trainer._run_settings().data_parallel
    with pytest.raises(ConflictError, match="DataParallel"):
        trainer._attach()
    trainer.args._n_gpu = 1
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    with pytest.raises(ConflictError, match=r"distributed data parallel needs .* lisa breaks"):
        trainer._attach()


def test_checkpointing_by_transformers_and_by_memrt_is_refused(tmp_path: Path) -> None:
    options = {"strategies": ["activation_checkpoint"]}
    with pytest.raises(ConflictError, match="gradient_checkpointing=True and activation_checkp"):
        trainer_of(tmp_path, options=options, activation_checkpointing=True)
    model = model_of("llama")
    model.activation_checkpointing_enable()
    with pytest.raises(ConflictError, match="both own the recompute"):
        trainer_of(tmp_path, options=options, model=model)


def test_strategies_in_two_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one place"):
        trainer_of(tmp_path, options={"strategies": [LISA]}, strategies=["int8_states"])
    in_arguments = trainer_of(tmp_path, strategies=[LISA])
    given = trainer_of(tmp_path, options={"strategies": [LISA]})
    assert in_arguments.session.strategies == given.session.strategies


def test_an_optimizer_of_the_user_s_is_refused_when_a_strategy_brings_parts(
    tmp_path: Path,
) -> None:
    model = model_of("llama")
    before = dict(model.named_modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConflictError, match=r"SGD .* bring"):
        trainer_of(
            tmp_path,
            model=model,
            options={"strategies": [Bring()], "optimizers": (optimizer, None)},
        )
    with pytest.raises(ConflictError, match="adafactor"):
        trainer_of(tmp_path, options={"strategies": [Bring()]}, optim="adafactor")
    brought = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    with pytest.raises(ConflictError, match="SGD"):
        trainer_of(tmp_path, options={"strategies": [Bring()], **brought})
    assert dict(model.named_modules()) == before


def test_an_optimizer_made_by_a_subclass_is_refused_too(tmp_path: Path) -> None:
    class Mine(memrt.Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    trainer = trainer_of(tmp_path, cls=Mine, options={"strategies": [Bring()]})
    with pytest.raises(ConflictError, match="SGD"):
        trainer.train()
    switching = run(tmp_path, cls=Mine, options={"strategies": [LISA]})
    assert type(switching.session.optimizer) is torch.optim.SGD


def test_an_optimizer_of_the_user_s_works_where_none_is_brought(tmp_path: Path) -> None:
    model = model_of("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"strategies": [LISA], "optimizers": (optimizer, None)}
    trainer = run(tmp_path, model=model, options=options)
    assert trainer.session.optimizer is optimizer
    active = sum(p.requires_grad for p in model.parameters())
    assert 0 < len(optimizer.state) == active < len(list(model.parameters()))


def test_decay_groups_are_those_of_transformers(tmp_path: Path) -> None:
    def groups(options: dict[str, Any]) -> list[tuple[float, int]]:
        trainer = trainer_of(tmp_path, options=options, weight_decay=0.3)
        trainer.create_optimizer()
        assert trainer.create_optimizer() is trainer.optimizer
        return [(g["weight_decay"], len(g["params"])) for g in trainer.optimizer.param_groups]

    assert groups({"strategies": [Bring()]}) == groups({})


def test_a_mixin_in_the_wrong_place_is_refused() -> None:
    with pytest.raises(TypeError, match="must come before"):
        type("Wrong", (transformers.Trainer, MemoryMixin), {})


# -------------------------------------------------------------------- the order of calls


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


# -------------------------------------------------------------------- loss, backward, norm


@pytest.mark.parametrize("family", ["llama", "plain"])
def test_a_strategy_that_owns_backward_sees_the_trainer_s_loss(family: str, tmp_path: Path) -> None:
    """Llama divides by the step's tokens itself, the plain module leaves it to the Trainer."""
    settings: dict[str, Any] = {"family": family, "gradient_accumulation_steps": 5}
    plain = run(tmp_path, **settings)
    ours = run(tmp_path, options={"strategies": [Backward()]}, **settings)
    assert history(ours) == history(plain)
    assert_equal(weights(ours), weights(plain))


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


# -------------------------------------------------------------------- losses that are not finite


class Poison(transformers.TrainerCallback):  # type: ignore[misc]
    """Makes the loss infinite or NaN in the step after `steps` whole ones."""

    def __init__(self, value: float, steps: int) -> None:
        self.value, self.steps = value, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps:
            kwargs["model"].lm_head.weight.data[0, 0] = self.value


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


def test_without_a_checkpoint_of_this_run_none_is_named(tmp_path: Path) -> None:
    run(tmp_path, **SAVING)
    trainer = trainer_of(tmp_path, options={"callbacks": [Poison(math.nan, 1)]})
    with pytest.raises(NonFiniteLossError, match="none is saved yet"):
        trainer.train()
    resumed = trainer_of(tmp_path, options={"callbacks": [Poison(math.nan, 3)]})
    with pytest.raises(NonFiniteLossError, match="checkpoint-3"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("how", ["argument", "transformers"])
def test_it_can_be_left_on_as_in_transformers(how: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"stop_on_nonfinite": False}
    if how == "transformers":
        arguments = {"arguments_cls": transformers.TrainingArguments}
    trainer = run(tmp_path, options={"callbacks": [Poison(math.nan, 1)]}, **arguments)
    assert trainer.state.global_step == 6


# -------------------------------------------------------------------- memory report


def test_the_memory_report_counts_three_steps_and_changes_none(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2}
    plain = run(tmp_path / "plain", **options)
    trainer = run(tmp_path / "counted", memory_report=True, **options)
    assert history(trainer) == history(plain)
    assert_equal(weights(trainer), weights(plain))
    assert trainer.session.ledger is None
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    hooks = [m for m in trainer.model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks
    report = json.loads((tmp_path / "counted/memrt/report.json").read_text())
    num_bytes = 4 * sum(p.numel() for p in trainer.model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in trainer.model.buffers())
    counts = 4 * len(list(trainer.model.parameters()))  # AdamW's step of each parameter
    assert report["accounts"]["weights"] == num_bytes + buffers
    assert report["accounts"]["optimizer"] == 2 * num_bytes + counts
    assert sum(report["accounts"].values()) == report["peak_bytes"] == report["places"]["device"]
    assert max(report["phases"].values()) == report["peak_bytes"]
    assert sum(report["owners"].values()) == report["peak_bytes"]
    assert 0 < len(report["top_allocations"]) <= 10
    assert report["conditions"]["num_steps"] == 3
    assert report["conditions"]["strategies"] == []


def test_the_memory_report_shows_what_a_strategy_saves(tmp_path: Path) -> None:
    reports = {}
    for spec in (SPECS["galore"], LISA):
        run(tmp_path / spec, memory_report=True, strategies=[spec], max_steps=2)
        reports[spec] = json.loads((tmp_path / spec / "memrt/report.json").read_text())
        assert reports[spec]["conditions"]["num_steps"] == 2  # ended before the third
    full = 2 * 4 * reports[LISA]["conditions"]["num_parameters"]
    assert all(report["accounts"]["optimizer"] < full for report in reports.values())


def test_counting_ends_with_an_exception(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, memory_report=True, options={"callbacks": [Poison(math.nan, 1)]})
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


# -------------------------------------------------------------------- over other trainers


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
