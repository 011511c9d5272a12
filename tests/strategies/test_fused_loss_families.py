"""Every language model of transformers that can be built small: its own loss, or an error.

A family whose head does something that nobody knows of must be refused, at attaching or at its
first loss, and never train on another loss. Some take seconds to import, so this runs nightly.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
)

import memrt

VOCABULARY = 99
LARGEST = 30_000_000
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim")
INNER = ("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim")
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "n_heads")
MORE_HEADS = ("decoder_attention_heads", "encoder_attention_heads", "num_experts")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "head_dim": 8,
    "d_kv": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "encoder_layers": 2,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    # far from neutral, where a family has them
    "logits_scaling": 2.0,
    "logit_scale": 0.5,
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0,
    "output_logit_soft_cap": 2.0,
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(INNER, 64),
    **dict.fromkeys(DEPTHS, 2),
    **dict.fromkeys((*HEADS, *MORE_HEADS), 4),
}
KNOWN = {"llama", "gpt2", "gemma2", "cohere2_moe", "granitemoe", "nanochat", "xlstm", "opt", "mpt"}
"""Of these a skip would be a fault of this test."""

CASES = [
    (kind, name)
    for mapping in (CAUSAL, MASKED)
    for kind, names in mapping.items()
    for name in ([names] if isinstance(names, str) else names)
]


def _build(kind: str, name: str) -> nn.Module:
    """A small model of random weights, norms and biases included, without dropout."""
    config_class, model_class = CONFIG_MAPPING[kind], getattr(transformers, name)
    default = config_class()
    sizes = {key: value for key, value in SIZES.items() if hasattr(default, key)}
    try:
        config = config_class(**sizes)
    except (TypeError, ValueError):
        sizes.pop("head_dim", None)
        config = config_class(**sizes)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > LARGEST:
        pytest.skip(f"{count} parameters")
    torch.manual_seed(0)
    model: nn.Module = model_class(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    torch.manual_seed(1)
    return float(model(**batch).loss.detach())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_loss_is_the_models_own_or_an_error(kind: str, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    batch = {"input_ids": ids, "labels": labels}
    try:
        model = _build(kind, name)
        own = _loss(model, batch)
    except Exception as error:
        if kind in KNOWN:
            raise
        pytest.skip(f"cannot be built small: {type(error).__name__}: {error}")
    if _loss(model, batch) != own:
        pytest.skip("its own loss is not reproducible")
    try:
        run = memrt.prepare(model, ["fused_loss(chunk_tokens=5)"])
        with run.micro_batch():
            fused = _loss(model, batch)
    except ValueError:
        assert kind not in KNOWN
        return
    assert fused == pytest.approx(own, rel=1e-5)
