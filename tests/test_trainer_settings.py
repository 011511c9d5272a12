"""What the Trainer tells strategies about the run, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

import memrt
from memrt import MemoryMixin
from memrt.errors import ConflictError
from memrt.structure import RunSettings
from tests.contract import SPECS
from tests.trainer_runs import (
    CHECKPOINTING,
    assert_equal,
    model_of,
    run,
    trainer_of,
    weights,
)
from tests.trainer_stubs import Bring

LISA = "lisa(layers=1, every=2)"


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
        **{CHECKPOINTING: True},
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
    assert trainer.session is not None
    trainer.session.detach()
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
        trainer_of(tmp_path, options=options, **{CHECKPOINTING: True})
    model = model_of("llama")
    getattr(model, f"{CHECKPOINTING}_enable")()
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


class Layered(transformers.Trainer):  # type: ignore[misc]
    """Makes its AdamW as transformers does, with a rate of its own for the head."""

    options: ClassVar[dict[str, Any]] = {}
    leaves_out = "nothing"

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            named = [(n, p) for n, p in self.model.named_parameters() if self.leaves_out not in n]
            head = [p for n, p in named if "head" in n]
            rest = [p for n, p in named if "head" not in n]
            groups = [{"params": rest, "weight_decay": 0.2}, {"params": head, "lr": 0.1}]
            settings = {"lr": self.args.learning_rate, "weight_decay": 0.0, **self.options}
            self.optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        return self.optimizer


@pytest.mark.parametrize("spec", [LISA, "int8_states", "galore(rank=4)", "lomo"])
def test_the_groups_of_a_trainer_s_own_optimizer_are_taken_over(spec: str, tmp_path: Path) -> None:
    cls = type("Mixed", (MemoryMixin, Layered), {})
    trainer = trainer_of(tmp_path, cls=cls, options={"strategies": [spec]}, max_grad_norm=0.0)
    assert trainer.create_optimizer() is trainer.optimizer is trainer.session.optimizer
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    settings = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    expected = {n: (0.1, 0.0) if "head" in n else (1e-3, 0.2) for n in names.values()}
    assert settings == expected
    assert type(trainer.optimizer) is not torch.optim.AdamW


def test_they_train_as_the_trainer_itself_does(tmp_path: Path) -> None:
    """fp32 weights have the bits of torch's fused AdamW, updated in backward too."""
    plain = run(tmp_path / "plain", cls=Layered, max_grad_norm=0.0)
    cls = type("Mixed", (MemoryMixin, Layered), {})
    ours = run(
        tmp_path / "ours", cls=cls, options={"strategies": ["in_backward"]}, max_grad_norm=0.0
    )
    assert_equal(weights(ours), weights(plain))


@pytest.mark.parametrize(
    ("attributes", "spec", "message"),
    [
        ({"options": {"amsgrad": True}}, "int8_states", "amsgrad=True.*int8_states cannot take"),
        ({"options": {"betas": (0.9, 0.9)}}, "lomo", r"betas=\(0.9, 0.9\), which is AdamW's"),
        ({"leaves_out": "head"}, LISA, "leaves out lm_head.weight .* requires_grad_"),
    ],
)
def test_groups_that_cannot_be_taken_over_are_refused(
    attributes: dict[str, Any], spec: str, message: str, tmp_path: Path
) -> None:
    cls = type("Mixed", (MemoryMixin, Layered), attributes)
    trainer = trainer_of(tmp_path, cls=cls, options={"strategies": [spec]}, max_grad_norm=0.0)
    with pytest.raises(ConflictError, match=message):
        trainer.train()


def test_a_mixin_in_the_wrong_place_is_refused() -> None:
    with pytest.raises(TypeError, match="must come before"):
        type("Wrong", (transformers.Trainer, MemoryMixin), {})


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (SPECS["ladder"], "no strategy brings a part of the optimizer"),
        ("peft(method='lora')", "no strategy brings a part of the optimizer"),
        ("int8_states", "no parameter that trains is bf16"),
    ],
)
def test_rounding_that_nothing_heeds_is_refused_and_leaves_the_model(
    spec: str, why: str, tmp_path: Path
) -> None:
    model = model_of("llama")
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=rf"stochastic_rounding=False has no effect: {why}"):
        trainer_of(tmp_path, model=model, strategies=[spec], stochastic_rounding=False)
    assert list(model.state_dict()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
