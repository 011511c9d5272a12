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
from memrt.ladder.shape import narrow_config
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


# ---------------------------------------------------------------- blocks that run more than once


def albert(**values: Any) -> Any:
    config = transformers.AlbertConfig(
        vocab_size=99, embedding_size=32, intermediate_size=128, **{**SIZES, **values}
    )
    return transformers.AlbertForSequenceClassification(config)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_albert_whose_blocks_are_several_layers_each_is_refused(groups: int) -> None:
    model = albert(num_hidden_layers=3, num_hidden_groups=groups)
    kinds = [type(module) for module in model.modules()]
    match = (
        rf"AlbertForSequenceClassification runs its {groups} blocks of "
        r"albert\.encoder\.albert_layer_groups 3 times a forward.*num_hidden_groups=3"
    )
    with pytest.raises(ConflictError, match=match):
        memrt.prepare(model, ["ladder(reduction=2, init='random')"])
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_albert_with_a_block_for_every_layer_trains() -> None:
    model = albert(num_hidden_layers=2, num_hidden_groups=2).eval()
    batch = {**tiny_batches("llama")[0], "labels": torch.tensor([0, 1])}
    session = memrt.prepare(model, ["ladder(reduction=2, init='random')"], lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(float(session.train_micro_batch(lambda: model_loss(model, batch))))
        session.step()
    assert losses[-1] < losses[0]


def test_a_transformers_body_that_is_looped_before_its_norm_is_refused_as_it_runs() -> None:
    class Looped(transformers.LlamaModel):  # type: ignore[misc]
        def forward(self, inputs_embeds: Tensor) -> Tensor:
            x, positions = inputs_embeds, torch.arange(inputs_embeds.shape[1])[None]
            rotary = self.rotary_emb(x, positions)
            for _ in range(2):
                for layer in self.layers:
                    x = layer(x, position_embeddings=rotary)
            result: Tensor = self.norm(x)
            return result

    config = transformers.LlamaConfig(**SIZES, intermediate_size=64, vocab_size=99)
    model = Looped(config)
    memrt.prepare(model, ["ladder(reduction=2)"])
    for _ in range(2):  # what the first left behind is not in the way of the second
        with pytest.raises(ValueError, match="block 0 of layers ran on what the ladder"):
            model(torch.randn(2, 5, 64))


def bamba() -> Any:
    config = transformers.BambaConfig(
        **SIZES,
        intermediate_size=128,
        vocab_size=99,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=8,
    )
    return transformers.BambaForCausalLM(config)


def granite_hybrid() -> Any:
    config = transformers.GraniteMoeHybridConfig(
        **SIZES,
        intermediate_size=128,
        vocab_size=99,
        num_key_value_heads=2,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=64,
    )
    return transformers.GraniteMoeHybridForCausalLM(config)


def falcon_h1() -> Any:
    config = transformers.FalconH1Config(
        **SIZES,
        intermediate_size=128,
        vocab_size=99,
        num_key_value_heads=2,
        mamba_d_ssm=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=8,
    )
    return transformers.FalconH1ForCausalLM(config)


@pytest.mark.parametrize("build", [bamba, granite_hybrid, falcon_h1])
def test_state_spaces_have_fewer_heads_as_attention_has(build: Any) -> None:
    torch.manual_seed(0)
    model = build().eval()
    batch = tiny_batches("llama")[0]
    with torch.no_grad():
        expected = model(**batch)["logits"]
    session = memrt.prepare(model, ["ladder(reduction=2)"], lr=1e-2)
    mixers = [m for m in model.modules() if hasattr(m, "A_log")]
    heads = [mixer.num_heads for mixer in mixers]
    assert heads
    assert set(heads) == {8, 4}
    with torch.no_grad():
        assert torch.equal(model(**batch)["logits"], expected)
    losses = []
    for _ in range(6):
        losses.append(float(session.train_micro_batch(lambda: model_loss(model, batch))))
        session.step()
    assert losses[-1] < losses[0]


def test_attention_in_parts_needs_as_many_heads() -> None:
    config = transformers.CodeGenConfig(
        vocab_size=99, n_positions=64, n_ctx=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8
    )
    model = transformers.CodeGenForCausalLM(config)
    with pytest.raises(ConflictError, match="leaves 2 heads, and the attention of codegen takes"):
        memrt.prepare(model, ["ladder(reduction=2)"])


def test_lists_of_layers_are_no_blocks() -> None:
    """Nothing runs a list: its layers are the blocks, and of Funnel's there are several lists."""
    config = transformers.FunnelConfig(
        vocab_size=99, block_sizes=[2, 2], d_model=64, n_head=4, d_head=16, d_inner=128
    )
    model = transformers.FunnelForSequenceClassification(config)
    stacks = discover(model).stacks
    assert [len(stack.layers) for stack in stacks] == [2, 2]
    assert all("forward" in vars(type(layer)) for stack in stacks for layer in stack.layers)
    with pytest.raises(ConflictError, match=r"has 2 lists of repeated blocks \(funnel\.encoder"):
        memrt.prepare(model, ["ladder(reduction=2)"])


# ---------------------------------------------------------------- what the user has chosen


def bert() -> Any:
    config = transformers.BertConfig(**SIZES, intermediate_size=64, vocab_size=99)
    return transformers.BertForSequenceClassification(config)


def only(*parts: str, build: Any = bert) -> nn.Module:
    model: nn.Module = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model


@pytest.mark.parametrize(
    ("parts", "settings"),
    [
        (("layer.1.", "classifier"), ""),
        (("embeddings", "classifier"), ""),
        (("LayerNorm",), ", head='frozen'"),
        (("bias",), ""),
    ],
    ids=str,
)
def test_a_backbone_with_trainable_parameters_left_is_refused(
    parts: tuple[str, ...], settings: str
) -> None:
    model = only(*parts)
    before = [parameter.requires_grad for parameter in model.parameters()]
    match = r"the backbone is frozen in part: \d+ of its parameters train .*freeze all of it"
    with pytest.raises(ConflictError, match=match):
        memrt.prepare(model, [f"ladder(reduction=2{settings})"])
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_frozen_embeddings_below_blocks_that_train_are_no_frozen_backbone() -> None:
    model = only("encoder", "classifier", "pooler")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    session = memrt.prepare(model, ["ladder(reduction=2)"])
    assert not any(p.requires_grad for n, p in model.named_parameters() if "bert.embed" in n)
    session.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("parts", "settings"),
    [((), ""), (("classifier", "pooler"), ""), (("classifier",), ", head='frozen'")],
    ids=str,
)
def test_a_frozen_backbone_is_taken_with_a_task_head_that_trains(
    parts: tuple[str, ...], settings: str
) -> None:
    model = only(*parts)
    memrt.prepare(model, [f"ladder(reduction=2{settings})"])
    trains = {n for n, p in model.named_parameters() if p.requires_grad and CHILD not in n}
    assert {name.split(".")[-2] for name in trains} <= {"classifier", "dense"}
    assert bool(trains) == (bool(parts) and not settings)


def ernie_moe() -> Any:
    """Its routers' biases are frozen, in the blocks."""
    config = transformers.Ernie4_5_MoeConfig(
        **SIZES,
        num_key_value_heads=2,
        intermediate_size=64,
        moe_intermediate_size=64,
        moe_num_experts=2,
        moe_k=1,
        moe_layer_start_index=0,
        vocab_size=99,
    )
    return transformers.Ernie4_5_MoeForCausalLM(config)


@pytest.mark.parametrize("build", [whisper, ernie_moe])
def test_what_transformers_freezes_by_itself_is_nobody_s_choice(build: Any) -> None:
    model = build()
    assert not all(parameter.requires_grad for parameter in model.parameters())
    memrt.prepare(model, ["ladder(reduction=2)"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_with_peft_s_adapters_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ConflictError, match=r"has PEFT's adapters \(.*merge_and_unload"):
        memrt.prepare(model, ["ladder(reduction=2)"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    prompt = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(ConflictError, match=r"has PEFT's adapters \(prompt_encoder"):
        memrt.prepare(peft.get_peft_model(bert(), prompt), ["ladder(reduction=2)"])


# ---------------------------------------------------------------- widths by other names


def distilbert() -> Any:
    config = transformers.DistilBertConfig(
        dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=99
    )
    return transformers.DistilBertForSequenceClassification(config)


def granite_moe_shared(**values: Any) -> Any:
    given = {"shared_intermediate_size": 128, **values}
    config = transformers.GraniteMoeSharedConfig(
        **SIZES, intermediate_size=64, vocab_size=99, num_local_experts=2, **given
    )
    return transformers.GraniteMoeSharedForCausalLM(config)


def llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        intermediate_size_mlp=128,
        interleave_moe_layer_step=2,
        num_local_experts=2,
        vocab_size=99,
    )
    return transformers.Llama4ForCausalLM(config)


def ctrl() -> Any:
    config = transformers.CTRLConfig(n_embd=64, dff=128, n_layer=2, n_head=4, vocab_size=99)
    return transformers.CTRLLMHeadModel(config)


@pytest.mark.parametrize("build", [distilbert, granite_moe_shared, llama4, ctrl])
def test_no_feed_forward_keeps_the_backbone_s_width(build: Any) -> None:
    model = build()
    widest = [p.shape for n, p in model.named_parameters() if "embed" not in n and 128 in p.shape]
    assert widest
    memrt.prepare(model, ["ladder(reduction=4, init='random')"])
    side = [(n, p) for n, p in model.named_parameters() if ".ladder.block." in n]
    assert side
    assert not [(name, p.shape) for name, p in side if 128 in p.shape]


@pytest.mark.parametrize(
    "key",
    [
        "shared_experts_intermediate_size",  # Dots
        "moe_shared_expert_intermediate_size",  # NemotronH
        "expert_ffn_hidden_size",  # LongCat
        "dense_intermediate_size",  # MiniMax
        "prefix_dense_intermediate_size",  # Cohere2 MoE
    ],
)
def test_widths_of_experts_are_divided_by_whatever_name(key: str) -> None:
    config = transformers.LlamaConfig(**SIZES, **{key: 128})
    assert getattr(narrow_config(config, 4), key) == 32
    with pytest.raises(ValueError, match=f"reduction=4 does not divide the model's {key} of 126"):
        narrow_config(transformers.LlamaConfig(**SIZES, **{key: 126}), 4)


def test_a_width_of_zero_stays_none() -> None:
    model = granite_moe_shared(shared_intermediate_size=0)
    memrt.prepare(model, ["ladder(reduction=2, init='random')"])


def xlnet() -> Any:
    config = transformers.XLNetConfig(d_model=64, n_layer=2, n_head=4, d_inner=128, vocab_size=99)
    return transformers.XLNetForSequenceClassification(config)


def test_xlnet_s_positions_of_its_own_width_are_refused() -> None:
    model = xlnet()
    assert narrow_config(model.config, 2).d_inner == 64
    with pytest.raises(ConflictError, match="given output_g of the model's own width"):
        memrt.prepare(model, ["ladder(reduction=2)"])


def phi3(*, heads: int) -> Any:
    factors = [1.0] * (64 // heads // 2)
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    config = transformers.Phi3Config(
        **{**SIZES, "num_attention_heads": heads},
        intermediate_size=64,
        vocab_size=99,
        pad_token_id=0,
        original_max_position_embeddings=16,
        max_position_embeddings=64,
        rope_scaling=scaling,
    )
    return transformers.Phi3ForCausalLM(config)


def test_a_factor_for_each_channel_needs_heads_as_wide_as_the_backbone_s() -> None:
    model = phi3(heads=2)
    match = r"reduction=4 makes the heads narrower than 32 channels.*rope_scaling.*use reduction=2"
    with pytest.raises(ConflictError, match=match):
        memrt.prepare(model, ["ladder(reduction=4)"])
    session = memrt.prepare(model, ["ladder(reduction=2)"], lr=1e-2)
    batch = tiny_batches("llama")[0]
    session.train_micro_batch(lambda: model_loss(model, batch))
    session.step()


# ---------------------------------------------------------------- weights that are bytes


def four_bits() -> nn.Module:
    """As bitsandbytes' Linear4bit keeps them: packed bytes, of another shape."""

    class Linear4bit(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, x.new_zeros(self.out_features, self.in_features))

    config = transformers.LlamaConfig(**SIZES, intermediate_size=64, vocab_size=99)
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear4bit
            packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
            layer.weight = nn.Parameter(packed, requires_grad=False)
    return model


def test_bytes_of_another_library_are_not_pruned(caplog: pytest.LogCaptureFixture) -> None:
    match = r"of a Linear4bit is stored as torch\.uint8.*init='random'"
    for init in ("magnitude", "principal", "fisher"):
        with pytest.raises(ConflictError, match=match):
            memrt.prepare(four_bits(), [f"ladder(reduction=2, init='{init}')"])
    model = four_bits()
    session = memrt.prepare(model, ["ladder(reduction=2)"], lr=1e-2)
    assert "starts from random weights, for the weight" in caplog.text
    batch = tiny_batches("llama")[0]
    session.train_micro_batch(lambda: model_loss(model, batch))
    session.step()
