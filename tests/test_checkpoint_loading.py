"""Weights of a checkpoint come back whole, tensor by tensor, under whatever name they lie there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from memrt import checkpoint_saving
from memrt.checkpoint import CheckpointMixin
from memrt.checkpoint_loading import load_weights
from memrt.profiling.ledger import Ledger
from memrt.testing import FAMILIES, TINY_FAMILIES, tiny_model
from tests.trainer_runs import assert_equal, examples, model_of, run, trainer_of, weights

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
OFTEN = (*FAMILIES, "mixtral", "t5")


def fresh(family: str) -> nn.Module:
    torch.manual_seed(7)
    return tiny_model(family)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in TINY_FAMILIES],
)
def test_every_family_resumes_as_if_never_stopped(family: str, tmp_path: Path) -> None:
    whole = run(tmp_path, family=family, model=fresh(family), **SAVING)
    again = run(
        tmp_path / "again",
        family=family,
        model=fresh(family),
        resume=str(tmp_path / "checkpoint-3"),
        **SAVING,
    )
    assert_equal(weights(again), weights(whole))


def test_shards_are_bounded_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_saving, "MAX_SHARD_BYTES", 40_000)
    trainer = run(tmp_path, **SAVING)
    folder = tmp_path / "checkpoint-5"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(t.nbytes for t in load_file(p).values()) <= 40_000 for p in shards)
    assert "save_pretrained" not in vars(trainer.model)
    other = model_of("llama", seed=1)
    load_weights(other, folder)
    assert_equal(dict(other.state_dict()), weights(trainer))


def test_the_best_model_is_read_the_same_way(tmp_path: Path) -> None:
    family = "mixtral"  # whose experts transformers' Trainer would leave as they are
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(
        tmp_path,
        family=family,
        model=fresh(family),
        load_best_model_at_end=True,
        learning_rate=0.5,  # so that it gets worse
        max_steps=3,
        options={"eval_dataset": examples(family, count=4)},
        **options,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-3"
    other = fresh(family)
    load_weights(other, best)
    assert_equal(weights(trainer), dict(other.state_dict()))


def test_reading_holds_one_tensor_above_the_model(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    largest = max(p.nbytes for p in model.parameters())
    with Ledger() as ledger:
        load_weights(model, tmp_path)
    held = sum(p.nbytes for p in model.parameters())  # the ledger meets them as they are filled
    assert held < ledger.timeline.peak().peak_bytes <= held + largest


def test_state_of_a_device_is_mapped_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"options": {"strategies": ["int8_states"]}, **SAVING}
    whole = run(tmp_path, **options)
    monkeypatch.setattr(CheckpointMixin, "_has_device", True)
    mapped = []
    load = torch.load

    def spy(*args: Any, **kwargs: Any) -> Any:
        from torch.utils.serialization import config

        mapped.append(bool(kwargs.get("mmap")) or config.load.mmap)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    again = run(tmp_path / "again", resume=str(tmp_path / "checkpoint-3"), **options)
    assert sum(mapped) >= 2  # the strategies' state and the optimizer's
    assert_equal(weights(again), weights(whole))


def _damage(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif change == "unknown":
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors[name].clone()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"lacks 'model.layers.1.mlp.up_proj.weight' of LlamaForCausalLM; resume from"),
        ("shape", r"'model.layers.1.mlp.up_proj.weight' has shape .* the model's has"),
        ("unknown", r"holds 'model.layers.9.mlp.up_proj.weight', which LlamaForCausalLM does not"),
    ],
)
def test_what_does_not_fit_is_named(change: str, message: str, tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    _damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path)


def test_a_model_that_ties_its_head_misses_nothing(tmp_path: Path) -> None:
    model = model_of("gpt2")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    other = model_of("gpt2", seed=1)
    load_weights(other, tmp_path)
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path, max_shard_size=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    shard = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / shard).unlink()
    with pytest.raises(ValueError, match=shard):
        load_weights(model, tmp_path)
