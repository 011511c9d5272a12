"""Layers, embeddings, head and body, found by structure."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from memrt.structure import discover, is_plain_linear
from memrt.testing import TINY_FAMILIES, tiny_model

PARTS: dict[str, tuple[tuple[str, ...], str | None, str | None]] = {
    "llama": (("model.layers",), "lm_head", "model"),
    "gpt2": (("transformer.h",), "lm_head", "transformer"),
    "bert": (("bert.encoder.layer",), "cls.predictions.decoder", "bert"),
    "t5": (("encoder.block", "decoder.block"), "lm_head", None),
    "mixtral": (("model.layers",), "lm_head", "model"),
    "vit": (("vit.layers",), None, "vit"),
    "qwen2": (("model.layers",), "lm_head", "model"),
    "qwen3": (("model.layers",), "lm_head", "model"),
    "mistral": (("model.layers",), "lm_head", "model"),
    "gemma2": (("model.layers",), "lm_head", "model"),
    "gemma3_text": (("model.layers",), "lm_head", "model"),
    "phi": (("model.layers",), "lm_head", "model"),
    "phi3": (("model.layers",), "lm_head", "model"),
    "opt": (("model.decoder.layers",), "lm_head", "model"),
    "roberta": (("roberta.encoder.layer",), "lm_head.decoder", "roberta"),
    "gpt_neox": (("gpt_neox.layers",), "lm_head", "gpt_neox"),
    "olmo2": (("model.layers",), "lm_head", "model"),
    "falcon": (("transformer.h",), "lm_head", "transformer"),
    "deepseek_v3": (("model.layers",), "lm_head", "model"),
    "plain": (("layers",), None, None),
}
"""Layers, head and body of every family."""

TIED: dict[str, set[str]] = {
    "gpt2": {"lm_head.weight", "transformer.wte.weight"},
    "bert": {
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.bias",
    },
    "t5": {
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    },
    "gemma2": {"lm_head.weight", "model.embed_tokens.weight"},
    "gemma3_text": {"lm_head.weight", "model.embed_tokens.weight"},
    "opt": {"lm_head.weight", "model.decoder.embed_tokens.weight"},
    "roberta": {
        "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.weight",
        "lm_head.bias",
        "lm_head.decoder.bias",
    },
    "falcon": {"lm_head.weight", "transformer.word_embeddings.weight"},
}
"""Parameters that have two names; the other families have none."""


def test_every_family_is_held_to_its_parts() -> None:
    assert set(PARTS) == {*TINY_FAMILIES, "plain"}


@pytest.mark.parametrize("family", PARTS)
def test_parts_of_each_family(family: str) -> None:
    stacks, head, body = PARTS[family]
    structure = discover(model := tiny_model(family))
    assert tuple(s.name for s in structure.stacks) == stacks
    assert structure.head == head
    assert structure.body == body
    assert structure.tied == TIED.get(family, frozenset())
    assert structure.embeddings
    assert structure.layer_of("elsewhere.weight") is None
    assert len(structure.layer_names) == 4 * len(stacks)
    held = {
        f"{layer}.{name}"
        for layer in structure.layer_names
        for name, _ in model.get_submodule(layer).named_parameters()
    }
    assert {n for n, _ in model.named_parameters() if structure.layer_of(n)} == held


@pytest.mark.parametrize("family", PARTS)
def test_attention_is_told_from_mlp_in_every_family(family: str) -> None:
    """Every block has linear weights of both kinds; norms around attention are not attention."""
    model = tiny_model(family)
    structure = discover(model)
    for layer in structure.layer_names if family != "plain" else []:
        weights = [n for n, p in model.named_parameters() if structure.layer_of(n) == layer]
        linear = [n for n in weights if model.get_parameter(n).ndim > 1]
        kinds = {structure.is_attention(name) for name in linear}
        assert kinds == {True, False}
        norms = [n for n in weights if "attention_norm" in n or "attention_layernorm" in n]
        assert not any(structure.is_attention(name) for name in norms)
    assert not structure.is_attention("lm_head.weight")


def test_a_sequential_of_blocks_and_a_model_without_layers() -> None:
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
    structure = discover(blocks)
    assert structure.layer_names == ["0", "1", "2"]
    assert structure.layer_of("1.0.weight") == "1"
    assert discover(nn.Linear(4, 4)).stacks == ()


def _block(size: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(size, size), nn.ReLU())


def test_blocks_with_names_of_their_own() -> None:
    named = OrderedDict((f"encoder_layer_{i}", _block()) for i in range(3))
    structure = discover(nn.ModuleDict({"layers": nn.Sequential(named)}))
    assert structure.layer_names[1] == "layers.encoder_layer_1"
    assert structure.layer_of("layers.encoder_layer_2.0.weight") == "layers.encoder_layer_2"


def test_encoder_and_decoder_of_unlike_depth_are_both_layers_and_a_small_list_is_not() -> None:
    model = nn.Transformer(8, 2, 4, 2, 16, batch_first=True)
    assert [len(s.layers) for s in discover(model).stacks] == [4, 2]
    model.register_module("taps", nn.ModuleList(_block(2) for _ in range(9)))
    names = [s.name for s in discover(model).stacks]
    assert names == ["encoder.layers", "decoder.layers"]


def test_a_block_that_comes_twice_is_one_layer() -> None:
    first, second = _block(), _block()
    model = nn.ModuleDict({"layers": nn.ModuleList([first, first, second])})
    assert discover(model).layer_names == ["layers.0", "layers.2"]


class _Scaled(nn.Linear):
    def forward(self, input):  # type: ignore[no-untyped-def]
        return 2 * super().forward(input)


def test_linear_layers_that_compute_more_are_not_plain() -> None:
    falcon = tiny_model("falcon").get_submodule("transformer.h.0.mlp.dense_h_to_4h")
    assert type(falcon).forward is not nn.Linear.forward
    assert is_plain_linear(falcon)
    assert is_plain_linear(nn.Linear(2, 2))
    assert not is_plain_linear(_Scaled(2, 2))
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_plain_linear(replaced)
