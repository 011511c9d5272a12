"""transformers' `optim` names that mean a strategy: what they become, and that it is exact."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import memrt
from memrt import MemoryMixin
from memrt.refused_optimizers import REFUSED_OPTIMIZERS
from memrt.spellings import OPTIMIZERS
from memrt.testing import FAMILIES
from tests.trainer_runs import (
    arguments,
    assert_equal,
    assert_same,
    history,
    model_of,
    run,
    saved_state,
    trainer_of,
    weights,
)

GALORE = "galore(rank=4, every=3, scale=0.5, targets='all-linear', form='plain')"
APOLLO = "apollo(rank=4, every=3, scale=0.5, targets='all-linear')"
BACKWARD = "in_backward(clip='two_pass')"
LOW_RANK = {
    "optim_args": "rank=4, update_proj_gap=3, scale=0.5",
    "optim_target_modules": "all-linear",
}
MEANING = {
    "galore_adamw": [GALORE],
    "galore_adamw_8bit": [GALORE, "int8_states"],
    "galore_adamw_layerwise": [GALORE, BACKWARD],
    "galore_adamw_8bit_layerwise": [GALORE, BACKWARD, "int8_states"],
    "apollo_adamw": [APOLLO],
    "apollo_adamw_layerwise": [APOLLO, BACKWARD],
    "lomo": ["lomo(clip='two_pass')"],
    "adalomo": ["adalomo(clip='two_pass')"],
    "adamw_8bit": ["int8_states"],
    "adamw_bnb_8bit": ["int8_states"],
    "adamw_torch_8bit": ["int8_states"],
    "adamw_torch_4bit": ["int4_states"],
}


def spelled(optim: str, **more: Any) -> dict[str, Any]:
    return {"optim": optim, **(LOW_RANK if OPTIMIZERS[optim].takes_targets else {}), **more}


def test_every_name_is_tested() -> None:
    assert MEANING.keys() == OPTIMIZERS.keys()
    theirs = {name.value for name in transformers.training_args.OptimizerNames}
    assert MEANING.keys() | REFUSED_OPTIMIZERS.keys() <= theirs
    ours = re.compile("galore|apollo|lomo|adalomo")  # whose packages cannot be resumed
    assert {
        name for name in theirs if ours.match(name)
    } <= MEANING.keys() | REFUSED_OPTIMIZERS.keys()


@pytest.mark.parametrize("optim", MEANING)
def test_it_becomes_a_strategy_with_one_warning(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        given = arguments(tmp_path, **spelled(optim))
        again = dataclasses.replace(given, learning_rate=0.5)
    assert given.strategies == again.strategies == MEANING[optim]
    assert given.optim == "adamw_torch"
    assert given.optim_args is given.optim_target_modules is None
    (message,) = caplog.messages
    assert message.startswith(f"optim={optim!r} is run as strategies=[")
    assert all(strategy in message for strategy in MEANING[optim])


@pytest.mark.parametrize("optim", MEANING)
def test_it_resumes_to_the_bit(optim: str, tmp_path: Path) -> None:
    options = spelled(optim, save_strategy="steps", save_steps=3)
    whole = run(tmp_path / "whole", **options)
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole/checkpoint-3"), **options)
    assert_equal(weights(resumed), weights(whole))
    assert_same(saved_state(resumed), saved_state(whole))
    assert history(resumed)[3:6] == history(whole)[3:6]


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo"])
def test_layer_by_layer_accumulates_clips_and_logs_the_true_norm(
    optim: str, tmp_path: Path
) -> None:
    """As the stock Trainer with plain AdamW does in the first step, before weights differ."""
    options: dict[str, Any] = {"max_steps": 1, "gradient_accumulation_steps": 3}
    plain = run(tmp_path / "plain", **options)
    found = run(tmp_path / "found", **spelled(optim, **options))
    norm = plain.state.log_history[0]["grad_norm"]
    assert found.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert norm > 1.0  # so that the default, max_grad_norm=1.0, clips
    if optim == "lomo":
        start = model_of("llama").state_dict()
        moved = [weights(found)[n] - start[n] for n, _ in found.model.named_parameters()]
        length = float(torch.stack([delta.double().square().sum() for delta in moved]).sum().sqrt())
        assert length == pytest.approx(1e-3 * norm / (norm + 1e-6), rel=1e-4)


def test_without_clipping_backward_runs_once(tmp_path: Path) -> None:
    given = arguments(tmp_path, **spelled("galore_adamw_layerwise", max_grad_norm=0))
    assert given.strategies == [GALORE, "in_backward"]
    assert arguments(tmp_path, optim="lomo", max_grad_norm=0.0).strategies == ["lomo"]


def test_it_is_the_authors_galore_in_the_stock_trainer(tmp_path: Path) -> None:
    """With an eps that does not count: transformers gives theirs 1e-6, 32 times that at step 1."""
    galore = pytest.importorskip("galore_torch")
    options: dict[str, Any] = {"max_steps": 4, "weight_decay": 0.0}
    ours = run(tmp_path / "ours", **spelled("galore_adamw", adam_epsilon=1e-20, **options))
    names = set(ours._strategies[0].projected(ours.session.facts))
    model = model_of("llama")
    group = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}
    optimizer = galore.GaLoreAdamW(
        [
            {"params": [p for n, p in model.named_parameters() if n not in names]},
            {"params": [p for n, p in model.named_parameters() if n in names], **group},
        ],
        lr=1e-3,
        eps=1e-20,
        no_deprecation_warning=True,
    )
    theirs = run(
        tmp_path / "theirs",
        cls=transformers.Trainer,
        arguments_cls=transformers.TrainingArguments,
        model=model,
        options={"optimizers": (optimizer, None)},
        **options,
    )
    for name, start in model_of("llama").state_dict().items():
        moved, expected = weights(ours)[name] - start, weights(theirs)[name] - start
        # elements whose gradient is rounding noise move by the full rate in either direction
        error = torch.linalg.vector_norm(moved - expected) / torch.linalg.vector_norm(expected)
        assert float(error) < 1e-3, name
    for log, other in zip(history(ours)[:4], history(theirs)[:4], strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert log["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_plain_arguments_and_other_trainers_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Mine(MemoryMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    plain = arguments(tmp_path, cls=transformers.TrainingArguments, **spelled("galore_adamw"))
    for _ in range(2):  # the caller's arguments stay as they are
        with caplog.at_level(logging.WARNING, logger="memrt"):
            caplog.clear()
            trainer = Mine(model=model_of("llama"), args=plain)
        assert [str(strategy) for strategy in trainer._strategies] == [GALORE]
        assert len(caplog.messages) == 1
        assert plain.optim == "galore_adamw"
        assert trainer.args.optim == "adamw_torch"
    both = Mine(model=model_of("llama"), args=plain, strategies=["activation_checkpoint"])
    assert [strategy.name for strategy in both._strategies] == ["galore", "activation_checkpoint"]


def test_other_names_stay_as_they_are(tmp_path: Path) -> None:
    for optim in ("adafactor", "sgd", "lion_8bit", "paged_adamw_8bit"):
        given = arguments(tmp_path, optim=optim, optim_args="momentum=0.9")
        assert (given.optim, given.optim_args, given.strategies) == (optim, "momentum=0.9", [])
    assert type(run(tmp_path, optim="adafactor", max_steps=1).optimizer.optimizer).__name__ == (
        "Adafactor"
    )


@pytest.mark.parametrize("optim", REFUSED_OPTIMIZERS)
def test_what_no_checkpoint_brings_back_is_refused_by_name(optim: str, tmp_path: Path) -> None:
    """The projector of galore-torch is an object in the optimizer's state."""
    match = rf"^optim='{optim}': .*use optim='{optim.replace('adafactor', 'adamw')}'"
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, optim=optim, **LOW_RANK)
    plain = arguments(tmp_path, cls=transformers.TrainingArguments)
    plain.optim = transformers.training_args.OptimizerNames(optim)
    with pytest.raises(ValueError, match=match):
        memrt.Trainer(model=model_of("llama"), args=plain)


def test_it_joins_the_strategies_that_are_listed(tmp_path: Path) -> None:
    options = spelled("galore_adamw")
    given = arguments(tmp_path, strategies=["activation_checkpoint"], **options)
    assert given.strategies == [GALORE, "activation_checkpoint"]
    assert arguments(tmp_path, strategies=[GALORE], **options).strategies == [GALORE]
    with pytest.raises(ValueError, match=r"optim='galore_adamw' means galore.* and strategies has"):
        arguments(tmp_path, strategies=["galore(rank=4)"], **options)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("all_linear", ["lm_head", "layers.0.mlp.up_proj", "layers.2.self_attn.q_proj"]),
        (["mlp", "self_attn.q_proj"], ["layers.0.mlp.up_proj", "layers.2.self_attn.q_proj"]),
        (r".*layers\.[01]\..*q_proj", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        ("model.layers.1.mlp.up_proj", ["layers.1.mlp.up_proj"]),
    ],
)
def test_target_modules_are_those_of_transformers(
    modules: Any, expected: list[str], tmp_path: Path
) -> None:
    """transformers' own rule over the same model is the oracle."""
    model = model_of("llama", tie_word_embeddings=False)
    options = {"optim_args": "rank=4", "optim_target_modules": modules}
    trainer = trainer_of(tmp_path, model=model, optim="galore_adamw", **options)
    (strategy,) = trainer._strategies
    found = set(strategy.projected(trainer.session.facts))
    every_linear = modules == "all_linear"
    from transformers.trainer_utils import check_target_module_exists

    assert found == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (every_linear or check_target_module_exists(modules, name))
    }
    assert all(any(name.endswith(f"{each}.weight") for name in found) for each in expected)
    trainer.train()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optim_args": "rnak=4"}, "no option 'rnak'; did you mean 'rank'"),
        ({"optim_args": "rank"}, "must be of the form name=value"),
        ({"optim_args": "rank=4,rank=8"}, "'rank' is given twice"),
        ({"optim_args": "rank=four"}, "rank='four': must be a whole number"),
        ({"optim_args": "scale=0"}, "scale=0: must be a number above 0"),
        ({"optim_args": "proj_type=full"}, "proj_type='full': memrt keeps the state in the sub"),
        ({"optim_args": "proj_type=reverse_std"}, "smaller side; use 'std'"),
        ({"optim_args": "proj=random"}, "no option 'proj'"),
        ({"optim_target_modules": None}, "needs optim_target_modules"),
        ({"optim_target_modules": ["("]}, "no regular expression"),
        ({"optim_target_modules": []}, "must be a name, or a list"),
        ({"optim": "apollo_adamw", "optim_args": "proj=svd"}, "proj='svd': memrt's sketch is ran"),
        ({"optim": "apollo_adamw", "optim_args": "scale_type=row"}, "scale_type='row'"),
        ({"optim": "lomo"}, "optim_target_modules='all-linear' has no effect with optim='lomo'"),
        ({"optim": "adamw_torch_4bit", "optim_args": "block_size=256"}, "have 128 elements"),
        ({"optim": "adamw_8bit", "optim_args": "betas=1"}, "no option 'betas' .options: none"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    given = {**spelled("galore_adamw"), "optim_args": "rank=4", **options}
    if given["optim"].startswith("adamw"):
        given["optim_target_modules"] = None
    elif given["optim"] == "lomo":
        given["optim_args"] = None
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, **given)


@pytest.mark.parametrize("modules", ["q_prj", ["up_proj", "q_prj"]])
def test_target_modules_that_match_nothing_are_named(modules: Any, tmp_path: Path) -> None:
    with pytest.raises(memrt.errors.ConflictError, match=r"targets: '.*q_prj.*' matches no train"):
        trainer_of(tmp_path, optim="galore_adamw", optim_target_modules=modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(family: str, tmp_path: Path) -> None:
    trainer = run(tmp_path, family=family, max_steps=2, **spelled("galore_adamw_layerwise"))
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
