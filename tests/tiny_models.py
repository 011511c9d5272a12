"""Configs of tiny transformers models, and how two models are compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL, num_key_value_heads=2),
    "llama_tied": lambda: transformers.LlamaConfig(
        **_SMALL, tie_word_embeddings=True, pad_token_id=0
    ),
    "llama_rope": lambda: transformers.LlamaConfig(**_SMALL, rope_parameters=dict(_LLAMA3)),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=96,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "bert": lambda: transformers.BertConfig(**_SMALL),
    "t5": lambda: transformers.T5Config(
        d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=96
    ),
    "bart": lambda: transformers.BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=96,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL, head_dim=8),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_SMALL,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_SMALL, num_local_experts=4, num_key_value_heads=2
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_SMALL, head_dim=8, num_key_value_heads=2),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=2
    ),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    ),
    "resnet": lambda: transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]
    ),
}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, tied ones under each name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def ties(model: nn.Module) -> list[list[str]]:
    """Names that share one tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors(model).items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def assert_equal_models(actual: nn.Module, expected: nn.Module) -> None:
    """Same class, names, bits, dtypes, strides, gradients wanted, ties, mode and persistence."""
    assert type(actual) is type(expected)
    got, wanted = tensors(actual), tensors(expected)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert type(got[name]) is type(tensor), name
        assert got[name].dtype == tensor.dtype, name
        assert got[name].stride() == tensor.stride(), name
        assert got[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(got[name], tensor), name
    assert ties(actual) == ties(expected)
    assert actual.state_dict().keys() == expected.state_dict().keys()
    assert actual.training == expected.training
