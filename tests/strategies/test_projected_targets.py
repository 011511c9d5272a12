"""Which weights a projection takes: by place, with the head, by name, by expression."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import memrt
from memrt import registry
from memrt.errors import ConflictError
from memrt.session import Session
from tests.strategies.runs import model_of
from tests.trainer_runs import assert_equal, run, trainer_of, weights
from tests.trainer_runs import model_of as trained_model

NAMES = "galore(rank=4, targets=('mlp', '.*q_proj'))"


def untied() -> torch.nn.Module:
    return trained_model("llama", tie_word_embeddings=False)


def test_names_and_expressions_come_back_from_text_and_json() -> None:
    strategy = registry.parse("galore(rank=4, targets=['mlp', '.*q_proj'])")
    assert str(strategy) == NAMES
    assert registry.parse(NAMES) == strategy == registry.from_json(strategy.to_json())


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("galore(targets='q_proj')", "use one of all, attention, mlp, all-linear, or a list"),
        ("apollo(targets=[])", r"targets=\[\]: must be a name, or a list"),
        ("fira(targets=[3])", r"targets=\[3\]: must be a name, or a list"),
        ("galore(targets=['('])", "is no regular expression"),
    ],
)
def test_wrong_targets_are_named(spec: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        registry.parse(spec)


def test_every_entry_must_match_something() -> None:
    with pytest.raises(ConflictError, match="targets: 'k_prj' matches no trainable linear weight"):
        memrt.prepare(model_of("llama"), ["galore(rank=4, targets=['mlp', 'k_prj'])"])


@pytest.mark.parametrize(
    ("targets", "remedy"),
    [
        ("mlp", "in the layers of .*; use targets='all', train some of them"),
        ("all", "in the layers of .*; use targets='all-linear', train some of them"),
        ("all-linear", "linear weight of [A-Za-z]+; train some of them .requires_grad., or use"),
    ],
)
def test_a_frozen_model_is_not_told_to_use_what_it_uses(targets: str, remedy: str) -> None:
    model = model_of("llama").requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ConflictError, match=f"targets='{targets}' matches no .*{remedy}"):
        memrt.prepare(model, [f"galore(rank=4, targets='{targets}')"])


@pytest.mark.parametrize("spec", [NAMES, "galore(rank=4, targets='all-linear')"])
def test_a_run_resumes_to_the_bit(spec: str, tmp_path: Path) -> None:
    options = {"strategies": [spec], "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "whole", model=untied(), **options)
    checkpoint = str(tmp_path / "whole/checkpoint-3")
    resumed = run(tmp_path / "resumed", model=untied(), resume=checkpoint, **options)
    assert_equal(weights(resumed), weights(whole))
    with pytest.raises(ValueError, match="checkpoint"):
        trainer_of(tmp_path / "other", model=untied(), strategies=["galore(rank=4)"]).train(
            resume_from_checkpoint=checkpoint
        )


def test_a_head_without_a_gradient_needs_its_own_forward() -> None:
    spec = "galore(rank=4, targets='all-linear')"
    with pytest.raises(ConflictError, match=r"takes the head lm_head .* fused_loss computes it in"):
        Session(untied(), registry.parse_all([spec, "fused_loss"]))
    for stack in ([spec], [spec.replace(")", ", form='plain')"), "fused_loss"]):
        Session(untied(), registry.parse_all(stack)).detach()
    # tied to the embeddings it is not a linear layer's alone, and keeps AdamW
    tied = trained_model("llama", tie_word_embeddings=True)
    Session(tied, registry.parse_all([spec, "fused_loss"])).detach()


@pytest.mark.parametrize("targets", ["['mlp']", "['.*[0-3].mlp.*']", "'all-linear'"])
def test_a_plan_of_many_layers_is_that_of_all(targets: str) -> None:
    config = untied().config
    config.num_hidden_layers = 7
    spec = f"galore(rank=4, targets={targets})"
    plans = [memrt.plan(config, [spec], sequence_length=8, full=full) for full in (False, True)]
    assert plans[0].peak_bytes == plans[1].peak_bytes
