"""Adapters know their base: saved beside them, checked at resume, at merge and at export."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import memrt
from memrt.base_record import BASE_NAME, BaseRecord, base_record, changed_weight, require_base
from memrt.cli.main import main
from memrt.export import export_checkpoint
from memrt.ladder_files import fingerprint
from memrt.model_source import for_task
from memrt.registry import strategy_class
from memrt.weight_sums import sums_differ, weight_sums
from tests.tiny_models import CONFIGS
from tests.trainer_runs import run

pytestmark = pytest.mark.filterwarnings(  # PEFT asks transformers by a name of before
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "learning_rate": 1e-2}
STACK = {"options": {"strategies": ["nf4", "peft(rank=4)"]}}


def _model(family: str, *, seed: int = 0, task: str | None = None) -> Any:
    """A model whose norms and biases are not what every model begins with."""
    config = CONFIGS[family]() if task is None else for_task(CONFIGS[family](), task)
    model = memrt.load(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2", "llama_tied"])
def test_it_is_the_hash_of_a_ladder_s_backbone_with_adapters_and_without(family: str) -> None:
    expected = fingerprint(_model(family), trained=())
    assert base_record(_model(family).requires_grad_(False)).fingerprint == expected
    for dtype, stack in ((torch.float32, []), (torch.bfloat16, []), (torch.float32, ["nf4"])):
        model = _model(family).to(dtype)
        memrt.prepare(model, [*stack, "peft(rank=2)"])
        found = base_record(model)
        assert (found.fingerprint, found.left_out) == (expected, ()), (dtype, stack)
    other = _model(family, seed=1).requires_grad_(False)
    assert base_record(other).fingerprint != expected


def test_what_trains_beside_the_adapters_is_left_out() -> None:
    model = _model("bert", task="sequence-classification")
    options = {"modules_to_save": ["classifier"], "bias": "lora_only"}
    memrt.prepare(model, [f"peft(targets=['query'], options={options})"])
    record = base_record(model)
    query = [f"bert.encoder.layer.{n}.attention.self.query.bias" for n in range(2)]
    assert record.left_out == (*query, "classifier.bias")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert base_record(model) == record
    wrapped = peft.get_peft_model(
        _model("bert", task="sequence-classification").requires_grad_(False),
        peft.LoraConfig(target_modules=["query"], bias="lora_only", modules_to_save=["classifier"]),
    )
    assert base_record(wrapped) == record


def test_a_run_s_adapters_are_resumed_on_their_base_alone(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", model=_model("llama"), **STACK, **SAVING)
    checkpoint = tmp_path / "run/checkpoint-2"
    record = BaseRecord.read(checkpoint)
    assert record == base_record(trainer.model)
    trainer.save_model(str(tmp_path / "saved"))
    assert BaseRecord.read(tmp_path / "saved") == record
    assert record is not None
    assert record.model == "LlamaForCausalLM"

    more = {**SAVING, "max_steps": 3, "resume": str(checkpoint)}
    assert run(tmp_path / "on", model=_model("llama"), **STACK, **more).state.global_step == 3
    before = {n: t.clone() for n, t in _model("llama", seed=1).state_dict().items()}
    other = _model("llama", seed=1)
    with pytest.raises(ValueError, match=r"another base \(a LlamaForCausalLM\) than this Llama"):
        run(tmp_path / "other", model=other, **STACK, **more)
    norms = [name for name in before if "norm" in name]
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in norms)
    (checkpoint / BASE_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"memrt_base\.json is damaged"):
        run(tmp_path / "damaged", model=_model("llama"), **STACK, **more)
    (checkpoint / BASE_NAME).unlink()  # what plain PEFT writes, and memrt wrote before
    found = run(tmp_path / "plain", model=_model("llama", seed=1), **STACK, **more)
    assert found.state.global_step == 3


@pytest.mark.parametrize("family", ["llama_tied", pytest.param("bert", marks=pytest.mark.slow)])
def test_merge_and_export_refuse_another_base(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read from files, in another precision than the run's; and loaded whole."""
    for seed, name in enumerate(("right", "wrong")):
        _model(family, seed=seed).save_pretrained(tmp_path / name)
    model = memrt.load(tmp_path / "right", dtype=torch.bfloat16)
    run(tmp_path / "run", model=model, family=family.split("_")[0], **STACK, **SAVING)
    checkpoint = tmp_path / "run/checkpoint-2"
    words = ["merge", str(checkpoint), str(tmp_path / "merged"), "--base"]
    assert main([*words, str(tmp_path / "right")]) == 0
    assert not (tmp_path / "merged" / BASE_NAME).exists()
    capsys.readouterr()
    words[2] = str(tmp_path / "other")
    assert main([*words, str(tmp_path / "wrong")]) == 1
    said = capsys.readouterr().err
    assert f"were trained on another base (a {type(model).__name__})" in said
    assert str(tmp_path / "wrong") in said
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match=f"another base .* than this {type(model).__name__}"):
        export_checkpoint(checkpoint, tmp_path / "other", base=memrt.load(tmp_path / "wrong"))

    loaded = peft.PeftModel.from_pretrained(memrt.load(tmp_path / "right"), checkpoint)
    assert loaded.peft_config["default"].r == 4
    (checkpoint / BASE_NAME).unlink()
    assert main([*words, str(tmp_path / "wrong")]) == 0


def test_the_published_adapters_of_memrt_train_know_their_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from memrt.cli.train_publish import write_trained

    model = _model("llama")
    trainer = run(tmp_path / "run", model=model, **STACK, **{**SAVING, "save_strategy": "no"})
    assert write_trained(trainer, tmp_path / "made", base="somewhere") == "adapters of somewhere"
    require_base(_model("llama"), tmp_path / "made")
    with pytest.raises(ValueError, match="were trained on another base"):
        require_base(_model("llama", seed=1), tmp_path / "made")
    plain = transformers.LlamaForCausalLM(CONFIGS["llama"]())
    plain.load_adapter(str(tmp_path / "made"))  # transformers' own way


def test_adapters_are_not_folded_in_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        _model("llama").to(dtype).save_pretrained(folder / "base")
        model = memrt.load(folder / "base")
        run(folder / "run", model=model, options={"strategies": ["peft(rank=4)"]}, **SAVING)
        checkpoint = folder / "run/checkpoint-2"
        words = ["merge", str(checkpoint), str(folder / "merged"), "--base"]
        assert main([*words, str(folder / "base")]) == 0
        capsys.readouterr()
        words[2] = str(folder / "twice")
        assert main([*words, str(folder / "merged")]) == 1
        assert "_proj.weight differs; give the model" in capsys.readouterr().err
        with pytest.raises(ValueError, match=r"_proj\.weight differs"):
            require_base(memrt.load(folder / "merged"), checkpoint)
        path = checkpoint / BASE_NAME
        values = json.loads(path.read_text())
        del values["weights"]  # as it was written before
        path.write_text(json.dumps(values))
        require_base(memrt.load(folder / "merged"), checkpoint)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_precision_of_one_base_is_taken(family: str, tmp_path: Path) -> None:
    base = _model(family)
    for before in ([], ["nf4"]):
        model = copy.deepcopy(base)
        memrt.prepare(model, [*before, "peft(rank=2)"])
        record = base_record(model)
        assert record.weights
        record.write(tmp_path)
        assert BaseRecord.read(tmp_path) == record
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for stack in ([], ["nf4"], ["int8"]):
                loaded = copy.deepcopy(base).to(dtype)
                memrt.prepare(loaded, [*stack, "peft(rank=2)"])
                assert changed_weight(loaded, record.weights) is None
                require_base(loaded, tmp_path)


def test_starts_that_change_weights_and_folded_adapters_leave_weights_out() -> None:
    model = _model("llama")
    memrt.prepare(model, ["peft(rank=2, options={'init_lora_weights': 'pissa'})"])
    assert base_record(model).weights == {}
    wrapped = peft.get_peft_model(_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    names = base_record(wrapped).weights.keys()
    assert "model.layers.0.self_attn.q_proj.weight" in names
    wrapped.merge_adapter()
    folded = {name for name in names if "q_proj" in name}
    assert base_record(wrapped).weights.keys() == names - folded


def test_what_sums_tell_apart() -> None:
    """A folded adapter of 1 % of a weight's norm, and no precision of it."""
    generator = torch.Generator().manual_seed(0)
    strategies: list[Any] = [strategy_class(name)() for name in ("nf4", "int8")]
    for shape in ((32, 64), (256, 512), (8, 32, 64)):
        for _ in range(20):
            weight = torch.randn(shape, generator=generator)
            dense = weight_sums(weight, packed=False)
            for dtype in (torch.bfloat16, torch.float16, torch.float64):
                other = weight.to(dtype)
                assert not sums_differ(dense, weight_sums(other, packed=False))
                other = weight.half().bfloat16()
                assert not sums_differ(dense, weight_sums(other, packed=False))
            changed = weight + 0.01 * torch.randn(shape, generator=generator)
            assert sums_differ(dense, weight_sums(changed, packed=False))
            assert not sums_differ(dense, weight_sums(changed, packed=True))
            another = torch.randn(shape, generator=generator)
            assert sums_differ(dense, weight_sums(another, packed=True))
            if weight.ndim == 2:
                for form in (strategy.packed_format for strategy in strategies):
                    made = form.dense(form.pack(weight, 0), shape, 0, torch.float32)
                    assert not sums_differ(dense, weight_sums(made, packed=True))


@pytest.mark.parametrize("bad", [[1], {"a": 1}, {"a": "dense 1 2"}, {"a": "odd" + " 1" * 18}])
def test_damaged_sums_are_named(bad: Any, tmp_path: Path) -> None:
    base_record(_model("llama")).write(tmp_path)
    values = json.loads((tmp_path / BASE_NAME).read_text())
    (tmp_path / BASE_NAME).write_text(json.dumps({**values, "weights": bad}))
    with pytest.raises(ValueError, match=r"memrt_base\.json is damaged .*; copy it again"):
        BaseRecord.read(tmp_path)


def test_other_versions_are_named(tmp_path: Path) -> None:
    base_record(_model("llama")).write(tmp_path)
    values = json.loads((tmp_path / BASE_NAME).read_text())
    (tmp_path / BASE_NAME).write_text(json.dumps({**values, "version": 9}))
    with pytest.raises(ValueError, match="has version 9, this memrt reads 1"):
        BaseRecord.read(tmp_path)
    assert BaseRecord.read(tmp_path / "nowhere") is None
