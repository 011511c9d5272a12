"""A side network alone: written, put on its backbone in any precision, refused on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import memrt
from memrt.base_record import base_hash
from memrt.errors import CheckpointWriteError
from memrt.ladder.attach import CHILD
from memrt.ladder_files import CONFIG_NAME, WEIGHTS_NAME
from memrt.runner import model_loss
from memrt.testing import tiny_batches, tiny_model
from tests.trainer_runs import assert_same, saved_state
from tests.trainer_runs import model_of as trainer_model_of
from tests.trainer_runs import run as trainer_run


def model_of(family: str = "llama", *, seed: int = 0, **overrides: Any) -> nn.Module:
    torch.manual_seed(seed)
    return tiny_model(family, **overrides)


def trained(model: nn.Module, spec: str = "ladder(reduction=2)") -> memrt.Session:
    session = memrt.prepare(model.train(), [spec], lr=1e-2)
    family = "bert" if "bert" in type(model).__name__.lower() else "llama"
    for seed in range(3):
        batch = tiny_batches(family, seed=seed)[0]
        session.train_micro_batch(lambda batch=batch: model_loss(model, batch))  # type: ignore[misc]
        session.step()
    return session


def logits(model: nn.Module, family: str = "llama") -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**tiny_batches(family, seed=7)[0])["logits"]
    return found


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "plain"])
def test_what_is_loaded_computes_what_was_written(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    session = trained(model)
    expected = logits(model)
    folder = memrt.save_ladder(session, tmp_path / "side")
    assert {path.name for path in folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    names = load_file(folder / WEIGHTS_NAME).keys()
    assert names
    assert all(CHILD in name.split(".") for name in names)

    torch.manual_seed(9)
    other = model_of(family)
    run = memrt.load_ladder(other, folder)
    assert torch.equal(logits(other), expected)
    run.detach()
    assert torch.equal(logits(other), logits(model_of(family)))


def test_it_is_small_beside_the_backbone(tmp_path: Path) -> None:
    model = model_of(hidden=128, layers=8, intermediate_size=512)
    session = memrt.prepare(model, ["ladder(reduction=8, taps='pooled')"])
    folder = memrt.save_ladder(session, tmp_path / "side")
    backbone = sum(p.numel() * 4 for n, p in model.named_parameters() if CHILD not in n)
    assert (folder / WEIGHTS_NAME).stat().st_size < backbone / 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_backbone_of_another_precision_is_the_same_backbone(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = memrt.save_ladder(trained(model_of()), tmp_path / "side")
    other = model_of().to(dtype)
    memrt.load_ladder(other, folder)
    assert {p.dtype for n, p in other.named_parameters() if ".up." in n} == {dtype}
    assert torch.isfinite(logits(other)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_backbone_in_float16_has_other_bits_and_must_be_near(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """fp32 by way of fp16 is rounded to other bf16 numbers; by 0.4 % of the norm it is another."""
    written, read = model_of().to(dtype), model_of()
    read = read.half() if dtype is torch.float32 else read
    session = memrt.prepare(written, ["ladder(reduction=2)"])
    folder = memrt.save_ladder(session, tmp_path / "side")
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert base_hash(read, left_out=()) != config["backbone"]
    memrt.load_ladder(read, folder)
    other = model_of()
    other = other.half() if dtype is torch.float32 else other
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.01)
    with pytest.raises(ValueError, match="another backbone"):
        memrt.load_ladder(other, folder)


def test_a_backbone_in_four_bits_is_the_same_backbone(tmp_path: Path) -> None:
    model = model_of()
    session = trained(model)
    expected = logits(model)
    folder = memrt.save_ladder(session, tmp_path / "side")
    other = model_of()
    run = memrt.load_ladder(other, folder, strategies=["nf4"])
    assert torch.equal(
        load_file(folder / WEIGHTS_NAME)["model.norm.ladder.up.weight"],
        other.get_parameter("model.norm.ladder.up.weight"),
    )
    # four bits move every weight by some 9 %; the logits by far less than what they are
    error = (logits(other) - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.5
    run.detach()


def test_another_backbone_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = memrt.save_ladder(trained(model_of()), tmp_path / "side")
    other = model_of(seed=1)
    with pytest.raises(ValueError, match="trained beside another backbone"):
        memrt.load_ladder(other, folder)
    assert all(CHILD not in name for name, _ in other.named_modules())
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_task_head_goes_along(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from memrt.testing import tiny_config

    def classifier() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = transformers.BertForSequenceClassification(tiny_config("bert"))
        return made

    model = classifier()
    session = memrt.prepare(model.train(), ["ladder(reduction=2)"], lr=1e-2)
    batch = {**tiny_batches("bert")[0], "labels": torch.tensor([0, 1])}
    session.train_micro_batch(lambda: model_loss(model, batch))
    session.step()
    folder = memrt.save_ladder(session, tmp_path / "side")
    assert "classifier.weight" in load_file(folder / WEIGHTS_NAME)
    other = classifier()
    memrt.load_ladder(other, folder)
    assert torch.equal(other.classifier.weight, model.classifier.weight)


STACKS = [["ladder(reduction=2)"], ["nf4", "ladder(reduction=2, taps='low_rank')", "int8_states"]]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_a_trainer_saves_the_side_network_alone_and_resumes(
    stack: list[str], tmp_path: Path
) -> None:
    options = {"strategies": stack}
    whole = trainer_run(tmp_path / "whole", options=options, **SAVING)
    checkpoint = tmp_path / "whole/checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {CONFIG_NAME, WEIGHTS_NAME, "optimizer.pt", "memrt_state.json"} <= names
    assert not any(name.startswith("model") or name == "config.json" for name in names)
    resumed = trainer_run(tmp_path / "again", options=options, resume=str(checkpoint), **SAVING)
    one, other = (t.model.state_dict() for t in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert_same(saved_state(resumed), saved_state(whole))

    whole.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {CONFIG_NAME, WEIGHTS_NAME, "training_args.bin"}
    fresh = trainer_model_of("llama")
    memrt.load_ladder(fresh, tmp_path / "saved", strategies=stack[:1] if len(stack) > 1 else [])
    assert torch.equal(logits(fresh), logits(whole.model))
    assert whole.model.save_pretrained.__func__ is type(whole.model).save_pretrained


def test_a_trainer_refuses_a_checkpoint_of_another_backbone_or_a_damaged_one(
    tmp_path: Path,
) -> None:
    options = {"strategies": STACKS[0]}
    trainer = trainer_run(tmp_path / "run", options=options, **SAVING)
    again: dict[str, Any] = {"options": options, **SAVING}
    again["resume"] = str(tmp_path / "run/checkpoint-2")
    other = trainer_model_of("llama", seed=8)
    with pytest.raises(ValueError, match="trained beside another backbone"):
        trainer_run(tmp_path / "other", model=other, **again)

    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.state.best_model_checkpoint = again["resume"]
    trainer._load_best_model()
    after = trainer.model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved
    assert all(CHILD in name.split(".") for name in moved)

    weights = tmp_path / "run/checkpoint-2" / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        trainer_run(tmp_path / "damaged", **again)


def test_bad_folders_and_sessions_are_refused(tmp_path: Path) -> None:
    model = model_of()
    with pytest.raises(ValueError, match="carries no ladder"):
        memrt.save_ladder(memrt.prepare(model), tmp_path / "side")
    session = memrt.prepare(model, ["ladder(reduction=2)"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="is taken"):
        memrt.save_ladder(session, tmp_path / "full")
    with pytest.raises(ValueError, match=r"has no ladder\.json"):
        memrt.load_ladder(model_of(), tmp_path / "full")
    folder = memrt.save_ladder(session, tmp_path / "side")
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        memrt.load_ladder(model_of(), folder)
    session.detach()
    with pytest.raises(ValueError, match="carries no ladder"):
        memrt.save_ladder(session, tmp_path / "after")


@pytest.mark.parametrize("strategies", [[], ["nf4"], ["int8"]], ids=str)
def test_a_backbone_with_other_weights_is_refused(strategies: list[str], tmp_path: Path) -> None:
    folder = memrt.save_ladder(trained(model_of()), tmp_path / "side")
    other = model_of()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.std())
    with pytest.raises(ValueError, match=r"another backbone .*: model\.layers\.0.* differs; load"):
        memrt.load_ladder(other, folder, strategies=strategies)
    assert all(CHILD not in name for name, _ in other.named_modules())
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    del config["weights"]  # as it was written before
    path.write_text(json.dumps(config))
    memrt.load_ladder(other, folder, strategies=strategies)


@pytest.mark.parametrize("before", [["ladder(reduction=2)"], ["nf4", "ladder(reduction=2)"]])
def test_every_precision_of_one_backbone_is_taken(before: list[str], tmp_path: Path) -> None:
    model = model_of().bfloat16()
    folder = memrt.save_ladder(memrt.prepare(model, before), tmp_path / "side")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for strategies in ([], ["nf4"], ["int8"]):
            memrt.load_ladder(model_of().bfloat16().to(dtype), folder, strategies=strategies)


def test_a_run_looks_at_the_backbone_s_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = memrt.prepare(model_of(), ["ladder(reduction=2)"])
    memrt.save_ladder(session, tmp_path / "one")
    calls: list[Tensor] = []

    def summed(weight: Tensor, *, packed: bool) -> str:
        calls.append(weight)
        return ""

    monkeypatch.setattr("memrt.base_record.weight_sums", summed)
    memrt.save_ladder(session, tmp_path / "two")
    assert not calls
    one, two = ((tmp_path / name / CONFIG_NAME).read_text() for name in ("one", "two"))
    assert one == two
    session.detach()
    memrt.save_ladder(memrt.prepare(session.model, ["ladder(reduction=2)"]), tmp_path / "three")
    assert calls


BAD_CONFIGS = [
    ("{", "is damaged .*; copy it again"),
    ("[1]", "is damaged .*list.*; copy it again"),
    ({"ladder": None}, "is damaged .*'ladder'.*; copy it again"),
    ({"backbone": None}, "is damaged .*'backbone'.*; copy it again"),
    ({"model": 3}, "is damaged .*'model'.*; copy it again"),
    ({"weights": {"layers.0.weight": "dense 1 2"}}, "is damaged .*layers.0.*; copy it again"),
    ({"version": 99}, "has version 99, this memrt reads 1; load it with"),
    ({"ladder": {"name": "nf4"}}, "has settings of 'nf4', not of a ladder; name what"),
    ({"ladder": {"name": "ladder", "wide": 3}}, "no option 'wide'.*; copy it again"),
    ({"ladder": {"name": "ladder", "reduction": 0}}, "reduction=0.*; copy it again"),
    ({"ladder": {"name": "ladder", "layers": [None]}}, "layers=.*; copy it again"),
]


@pytest.mark.parametrize(("change", "said"), BAD_CONFIGS, ids=[str(c) for c, _ in BAD_CONFIGS])
def test_a_bad_config_is_named_before_the_model_is_touched(
    change: str | dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = memrt.save_ladder(memrt.prepare(model_of(), ["ladder(reduction=2)"]), tmp_path / "one")
    path = folder / CONFIG_NAME
    if isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = model_of()
    with pytest.raises(ValueError, match=said) as caught:
        memrt.load_ladder(model, folder)
    assert str(path) in str(caught.value)
    assert all(CHILD not in name for name, _ in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_NAME
    path.touch()
    with pytest.raises(ValueError, match="is a file; name the folder that it lies in") as caught:
        memrt.load_ladder(model_of(), path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("spec", ["ladder(reduction=2)", "ladder(reduction=2, taps='projected')"])
def test_a_load_cuts_nothing_out_and_keeps_the_settings(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = trained(model_of(), spec)
    expected = logits(session.model)
    folder = memrt.save_ladder(session, tmp_path / "side")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were cut out of the backbone")

    for name in ("hidden_channels", "copy_pruned", "check_prunable"):
        monkeypatch.setattr(f"memrt.ladder.build.{name}", refuse)
    other = model_of()
    run = memrt.load_ladder(other, folder)
    assert torch.equal(logits(other), expected)
    again = memrt.save_ladder(run, tmp_path / "again")
    assert (again / CONFIG_NAME).read_text() == (folder / CONFIG_NAME).read_text()
    run.attachments[0].save_apart(tmp_path)
    assert (tmp_path / CONFIG_NAME).read_text() == (folder / CONFIG_NAME).read_text()


def test_a_backbone_of_bitsandbytes_is_the_same_backbone(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # its product on a CPU wants whole blocks
    wide: dict[str, Any] = {"hidden": 64, "intermediate_size": 128}
    model = model_of(**wide)
    session = trained(model)
    expected = logits(model)
    folder = memrt.save_ladder(session, tmp_path / "side")
    other = in_four_bits(model_of(**wide))
    memrt.load_ladder(other, folder)
    error = (logits(other) - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.5


def in_four_bits(model: nn.Module) -> nn.Module:
    """The blocks' linear layers as bitsandbytes' own, as a model that it packed has them."""
    import bitsandbytes as bnb

    for parent in model.get_submodule("model.layers").modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                packed = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4"
                )
                packed.weight = bnb.nn.Params4bit(
                    child.weight.detach().clone(), requires_grad=False, quant_type="nf4"
                )
                setattr(parent, name, packed.to("cpu"))
    return model


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memrt.prepare(model_of(), ["ladder(reduction=2)"])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        memrt.save_ladder(session, tmp_path / "side")
    assert not list(tmp_path.iterdir())
