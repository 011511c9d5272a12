"""Layers, embeddings, head and body, found by structure."""

from __future__ import annotations

import pytest
from torch import nn

from memrt.structure import discover
from memrt.testing import tiny_model


@pytest.mark.parametrize(
    ("family", "stack", "head", "body"),
    [
        ("llama", "model.layers", "lm_head", "model"),
        ("gpt2", "transformer.h", "lm_head", "transformer"),
        ("bert", "bert.encoder.layer", "cls.predictions.decoder", "bert"),
        ("plain", "layers", None, None),
    ],
)
def test_parts_of_each_family(family: str, stack: str, head: str | None, body: str | None) -> None:
    model = tiny_model(family)
    structure = discover(model)
    assert [s.name for s in structure.stacks] == [stack]
    assert structure.head == head
    assert structure.body == body
    first = structure.layer_names[0]
    assert structure.layer_of(f"{first}.anything.weight") == first
    assert structure.layer_of("elsewhere.weight") is None
    assert structure.embeddings
    inside = [name for name, _ in model.named_parameters() if structure.layer_of(name)]
    assert len(inside) == sum(len(list(m.parameters())) for m in structure.stacks[0].layers)


def test_tied_weights_are_named() -> None:
    tied = discover(tiny_model("gpt2")).tied
    assert tied == {"lm_head.weight", "transformer.wte.weight"}
    assert discover(tiny_model("plain")).tied == frozenset()


def test_a_sequential_of_blocks_and_a_model_without_layers() -> None:
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
    structure = discover(blocks)
    assert structure.layer_names == ["0", "1", "2"]
    assert structure.layer_of("1.0.weight") == "1"
    assert discover(nn.Linear(4, 4)).stacks == ()


def test_attention_is_told_from_mlp() -> None:
    structure = discover(tiny_model("llama"))
    assert structure.is_attention("model.layers.0.self_attn.q_proj.weight")
    assert not structure.is_attention("model.layers.0.mlp.up_proj.weight")
    assert not structure.is_attention("lm_head.weight")
