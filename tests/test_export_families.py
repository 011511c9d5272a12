"""Export of models that ask more of it: large weights, experts that files hold one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from memrt.export import export_checkpoint
from memrt.logits_check import logits_of
from memrt.testing import tiny_model

# PEFT asks a model of transformers for a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LARGE = 0.2
"""Spread of weights that leave attention far from even, as training does: rounding moves more."""


def _random_adapters(family: str, folder: Path, **options: Any) -> None:
    """A base with large weights, and random adapters on every linear layer, by PEFT alone."""
    torch.manual_seed(7)
    model: Any = tiny_model(family, layers=2)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=LARGE)
    model.save_pretrained(folder / "base")
    base = type(model).from_pretrained(folder / "base")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            nn.init.normal_(parameter, std=LARGE)
    model.save_pretrained(folder / "adapter")


@pytest.mark.parametrize("family", ["llama", "t5", "phi3"])
def test_verification_passes_what_rounding_alone_moves(family: str, tmp_path: Path) -> None:
    _random_adapters(family, tmp_path)
    check = export_checkpoint(tmp_path / "adapter", tmp_path / "out", verify=True).check
    assert check is not None
    assert 0 < check.max_difference <= check.tolerance < 3e-4 * check.rms
    lost = _logits_without_each_adapter(tmp_path)
    assert len(lost) >= 8
    assert min(lost.values()) > 20 * check.tolerance, lost


def _logits_without_each_adapter(folder: Path) -> dict[str, float]:
    """How far the exported model's logits move when one folded weight is the base's again."""
    architecture = json.loads((folder / "out/config.json").read_text("utf-8"))["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder / "out")
    whole, base = logits_of(model), load_file(folder / "base/model.safetensors")
    moved = {}
    for name, weight in model.named_parameters():
        if name in base and not torch.equal(weight, base[name]):
            folded = weight.detach().clone()
            weight.data.copy_(base[name])
            moved[name] = float((logits_of(model) - whole).abs().max())
            weight.data.copy_(folded)
    return moved


@pytest.mark.parametrize(("family", "bias"), [("opt", "all"), ("bert", "lora_only")])
def test_biases_that_trained_beside_adapters(family: str, bias: str, tmp_path: Path) -> None:
    _random_adapters(family, tmp_path, bias=bias)
    export_checkpoint(tmp_path / "adapter", tmp_path / "out", verify=True)
    written, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    changed = {name for name in base if not torch.equal(written[name], base[name])}
    norms = {name for name in changed if name.endswith(("layer_norm.bias", "LayerNorm.bias"))}
    assert {name for name in changed - norms if name.endswith(".bias")}
    assert bool(norms) is (bias == "all")


# PEFT doubles the rank of the fused projection, and then finds no module of that name
@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
@pytest.mark.parametrize(("family", "num_folded"), [("mixtral", 14), ("deepseek_v3", 13)])
def test_adapters_on_experts_that_files_hold_one_by_one(
    family: str, num_folded: int, tmp_path: Path
) -> None:
    """They are folded, and the files hold one by one again what they held so before."""
    _random_adapters(family, tmp_path)
    done = export_checkpoint(tmp_path / "adapter", tmp_path / "out", verify=True)
    assert done.num_folded == num_folded
    written, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    experts = [name for name in base if ".experts." in name]
    assert len(experts) >= 4 * 3
    assert not [name for name in experts if torch.equal(written[name], base[name])]


@pytest.mark.parametrize("dora", [False, True], ids=["streamed", "whole"])
def test_adapters_with_a_head_of_other_labels_than_the_base_s(dora: bool, tmp_path: Path) -> None:
    """As a classifier of images begins: from one that was trained on other classes."""
    torch.manual_seed(7)
    tiny_model("vit", layers=2).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["classifier"],
        init_lora_weights=False,
        use_dora=dora,
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    done = export_checkpoint(
        tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", verify=True
    )
    assert done.check is not None
    head = load_file(tmp_path / "out/model.safetensors")["classifier.weight"]
    assert torch.equal(head, model.classifier.modules_to_save["default"].weight)
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["vit.layernorm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layernorm\.weight' is .*\[7\]"):
        export_checkpoint(tmp_path / "adapter", tmp_path / "other", base=tmp_path / "base")
