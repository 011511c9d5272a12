"""A ladder beside models that register, drop out or cache what they do in their own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import memrt
from memrt.errors import ConflictError
from memrt.ladder.attach import CHILD, final_norm
from memrt.runner import model_loss
from memrt.structure import discover
from memrt.testing import tiny_batches

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
STACKS: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
}


def bart(**values: Any) -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**STACKS, **values))


def whisper() -> Any:
    config = transformers.WhisperConfig(
        **STACKS,
        num_mel_bins=8,
        max_source_positions=8,
        dropout=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


def gpt_neo() -> Any:
    config = transformers.GPTNeoConfig(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        vocab_size=99,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    )
    return transformers.GPTNeoForCausalLM(config)


def dinov2() -> Any:
    config = transformers.Dinov2Config(**SIZES, image_size=16, patch_size=8, drop_path_rate=0.5)
    return transformers.Dinov2ForImageClassification(config)


def opt(**values: Any) -> Any:
    config = transformers.OPTConfig(
        **SIZES, ffn_dim=64, vocab_size=99, max_position_embeddings=64, **values
    )
    return transformers.OPTForCausalLM(config)


RELATIVE: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 2,
    "vocab_size": 99,
    "decoder_start_token_id": 0,
}


def umt5() -> Any:
    """Every layer has a table of position biases of its own."""
    model = transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**RELATIVE))
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=2.0)
    return model


def longt5(**values: Any) -> Any:
    config = transformers.LongT5Config(**RELATIVE, local_radius=3, **values)
    return transformers.LongT5ForConditionalGeneration(config)


def t5gemma(*, encoder_hidden: int = 64) -> Any:
    part: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 99,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.T5GemmaConfig(
        encoder=transformers.T5GemmaModuleConfig(**{**part, "hidden_size": encoder_hidden}),
        decoder=transformers.T5GemmaModuleConfig(**part),
        vocab_size=99,
    )
    return transformers.T5GemmaForConditionalGeneration(config)


def bigbird_pegasus(*, attention_type: str = "original_full") -> Any:
    config = transformers.BigBirdPegasusConfig(**STACKS, attention_type=attention_type)
    return transformers.BigBirdPegasusForConditionalGeneration(config)


def led() -> Any:
    config = transformers.LEDConfig(
        **STACKS,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    )
    return transformers.LEDForConditionalGeneration(config)


def trocr(*, encoder_hidden: int = 64, **values: Any) -> Any:
    encoder = transformers.ViTConfig(
        **{**SIZES, "hidden_size": encoder_hidden},
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    decoder = transformers.TrOCRConfig(
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        vocab_size=99,
        max_position_embeddings=64,
        **values,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.VisionEncoderDecoderModel(config=config)


def nanochat() -> Any:
    """One norm before and behind its blocks."""
    config = transformers.NanoChatConfig(
        **SIZES, num_key_value_heads=4, intermediate_size=64, vocab_size=99
    )
    return transformers.NanoChatForCausalLM(config)


MODELS: dict[str, Any] = {
    "longt5": longt5,
    "longt5, global": lambda: longt5(encoder_attention_type="transient-global"),
    "t5gemma": t5gemma,
    "t5gemma, wide encoder": lambda: t5gemma(encoder_hidden=128),
    "bigbird_pegasus": bigbird_pegasus,
    "trocr": lambda: trocr(cross_attention_hidden_size=64),
    "trocr, wide encoder": lambda: trocr(encoder_hidden=128, cross_attention_hidden_size=128),
    "nanochat": nanochat,
    "umt5": umt5,
    "bart": lambda: bart(dropout=0.3, attention_dropout=0.3, activation_dropout=0.3),
    "bart, layers dropped": lambda: bart(encoder_layerdrop=0.5, decoder_layerdrop=0.5),
    "whisper": whisper,
    "opt, layers dropped": lambda: opt(layerdrop=0.5),
    "gpt_neo": gpt_neo,
    "dinov2": dinov2,
}


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model: nn.Module = led() if name == "led" else MODELS[name]()
    model.train()
    labels = torch.arange(3, 17).view(2, 7)
    if name == "whisper":
        return model, {"input_features": torch.randn(2, 8, 16), "labels": labels}
    if name.startswith("trocr"):
        return model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": labels}
    return model, tiny_batches("vit" if name == "dinov2" else "llama")[0]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits
    return result


@pytest.mark.parametrize("taps", ["linear", "pooled"])
@pytest.mark.parametrize("name", MODELS)
def test_it_starts_as_the_backbone_trains_and_leaves_it_so(name: str, taps: str) -> None:
    """In training, whatever the model's own forwards drop out; with a cache where one is made."""
    model, batch = built(name)
    expected = logits(model.eval(), batch)
    modes = {module: module.training for module in model.train().modules()}
    session = memrt.prepare(model, [f"ladder(reduction=2, taps='{taps}')"], lr=1e-2)
    assert all(torch.equal(logits(model, batch), expected) for _ in range(3))
    losses = []
    for _ in range(6):
        losses.append(float(session.train_micro_batch(lambda: model_loss(model, batch))))
        session.step()
    assert losses[-1] < losses[0]
    missed = [n for n, p in model.named_parameters() if CHILD in n and not p.requires_grad]
    assert not missed
    head = session.strategies[0].trained_head(session.facts)  # type: ignore[attr-defined]
    session.detach()
    assert {module: module.training for module in model.modules()} == modes
    if not head:
        assert torch.equal(logits(model.eval(), batch), expected)


@pytest.mark.parametrize("name", ["bart", "opt, layers dropped"])
def test_the_model_itself_still_says_whether_it_trains(name: str) -> None:
    model, _ = built(name)
    memrt.prepare(model, ["ladder(reduction=2)"])
    assert model.training
    assert not model.eval().training
    assert model.train().training


def test_the_final_norm_is_the_one_that_is_used_behind_the_blocks() -> None:
    """BART and mBART register that of the embeddings there, and T5Gemma its final one before them.

    mBART has a final norm too, and BigBirdPegasus one by the name of BART's other.
    """
    models: list[nn.Module] = [
        bart(),
        transformers.MBartForConditionalGeneration(transformers.MBartConfig(**STACKS)),
        bigbird_pegasus(),
        t5gemma(),
        opt(),
        nanochat(),
    ]
    found = [[final_norm(m, stack) for stack in discover(m).stacks] for m in models]
    assert found == [
        [None, None],
        ["model.encoder.layer_norm", "model.decoder.layer_norm"],
        ["model.encoder.layernorm_embedding", "model.decoder.layernorm_embedding"],
        ["model.encoder.norm", "model.decoder.norm"],
        ["model.decoder.final_layer_norm"],
        [None],
    ]


@pytest.mark.parametrize("name", ["bart", "gpt_neo", "led"])
def test_generation_is_that_of_the_whole_forward(name: str) -> None:
    model, batch = built(name)
    session = memrt.prepare(model, ["ladder(reduction=2)"], lr=3e-2)
    for _ in range(4):
        session.train_micro_batch(lambda: model_loss(model, batch))
        session.step()
    model.eval()
    made = [
        model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"][:, :6],
            min_new_tokens=8,
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=98,
            pad_token_id=0,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*made)
    assert made[0].shape[1] > 8


def deberta() -> Any:
    config = transformers.DebertaV2Config(
        **SIZES, intermediate_size=64, vocab_size=99, relative_attention=True
    )
    return transformers.DebertaV2ForMaskedLM(config)


def pegasus_x() -> Any:
    return transformers.PegasusXForConditionalGeneration(transformers.PegasusXConfig(**STACKS))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (deberta, "given rel_embeddings of the model's own width"),
        (pegasus_x, "given global_hidden_states of the model's own width"),
        (lambda: bigbird_pegasus(attention_type="block_sparse"), "attention_type='original_full'"),
        (lambda: trocr(encoder_hidden=128), "of its decoder by enc_to_dec_proj"),
    ],
)
def test_what_a_side_network_could_not_follow_is_refused(build: Any, reason: str) -> None:
    model = build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConflictError, match=reason):
        memrt.prepare(model, ["ladder(reduction=2)"])
    assert [type(module) for module in model.modules()] == kinds


def test_a_side_block_with_a_table_of_its_own_knows_positions() -> None:
    """Its heads' columns of the backbone's; without, permuted tokens give permuted output."""
    model: Any = built("umt5")[0]
    memrt.prepare(model, ["ladder(reduction=2)"])
    block = model.encoder.block[1].ladder.block.eval()
    wide = model.encoder.block[1].layer[0].SelfAttention.relative_attention_bias.weight
    side = block.layer[0].SelfAttention.relative_attention_bias.weight
    kept = [any(torch.equal(column, own) for own in wide.t()) for column in side.t()]
    assert kept == [True, True]
    order, x = torch.tensor([4, 2, 0, 5, 1, 3]), torch.randn(1, 6, 32)
    with torch.no_grad():
        first, second = (
            y[0] if isinstance(y, tuple) else y for y in (block(x), block(x[:, order]))
        )
    assert not torch.allclose(first[:, order], second, atol=1e-2)
