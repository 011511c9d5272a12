"""Tiny models and batches of every family, for the tests of memrt and of third-party strategies.

Models have a few thousand parameters, are built from configs, and take well under a second a step.
A family is a row of `TINY_FAMILIES`: the names that its config has for the usual sizes, what else a
tiny one needs, and what its structure brings that others lack. `SPECS` gives every strategy
settings that do something to models this small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "FAMILIES",
    "PARTNERS",
    "SPECS",
    "STACKS",
    "TINY_FAMILIES",
    "VOCABULARY",
    "PlainModel",
    "TinyFamily",
    "specs",
    "tiny_batches",
    "tiny_config",
    "tiny_model",
]

FAMILIES = ("llama", "gpt2", "bert", "plain")
"""The families that every test of memrt runs; the others are in `TINY_FAMILIES`."""

VOCABULARY = 99
_HEADS = 4
_IMAGE_SIZE = 16


SPECS: dict[str, str] = {
    "activation_checkpoint": "activation_checkpoint",
    "apollo": "apollo(rank=4, every=3)",
    "apollo_mini": "apollo_mini(every=3, scale=32.0)",
    "adalomo": "adalomo(clip='two_pass')",
    "badam": "badam(every=2)",
    "fira": "fira(rank=4, every=3)",
    "fp8_states": "fp8_states",
    "fused_lora": "fused_lora",
    "fused_loss": "fused_loss(chunk_tokens=8)",
    "galore": "galore(rank=4, every=3)",
    "int8": "int8",
    "in_backward": "in_backward(clip='two_pass')",
    "int4_states": "int4_states",
    "int8_states": "int8_states",
    "ladder": "ladder(reduction=2, taps='low_rank', seed=5)",
    "lisa": "lisa(layers=1, every=2)",
    "nf4": "nf4",
    "lomo": "lomo(clip='two_pass')",
    "offload_activations": "offload_activations(min_bytes=0)",
    "peft": "peft(rank=4, dropout=0.1)",
    "q_galore": "q_galore(rank=4, every=3)",
}
"""Every registered strategy with settings that bite on a model of a few thousand parameters."""

PARTNERS: dict[str, list[str]] = {"fused_lora": ["peft"], "int8": ["peft"], "nf4": ["peft"]}
"""Strategies that do not run alone, and what tests give them beside."""

STACKS: list[list[str]] = [
    ["activation_checkpoint", "offload_activations"],
    ["lisa", "int8_states"],
    ["galore", "int8_states"],
    ["galore", "fp8_states"],
    ["galore", "activation_checkpoint"],
    ["galore", "lisa"],
    ["galore(rank=4, every=3, form='plain')", "lisa"],
    ["apollo", "int8_states", "activation_checkpoint", "lisa"],
    ["fira", "int8_states", "lisa"],
    ["q_galore", "activation_checkpoint", "lisa"],
    ["ladder", "int8_states", "offload_activations"],
    ["badam", "int8_states", "activation_checkpoint"],
    ["galore", "in_backward", "int8_states"],
    ["adalomo", "activation_checkpoint"],
    ["activation_checkpoint", "offload_activations", "lisa", "int8_states"],
    ["nf4", "peft", "activation_checkpoint"],
    ["nf4", "peft", "fused_lora", "offload_activations"],
    ["int8", "peft", "int8_states", "offload_activations"],
    ["nf4", "ladder", "fp8_states"],
]
"""Stacks that must train on every family; each also with `fused_loss` where there is a head."""


def specs(names: Sequence[str]) -> list[str]:
    """Strategies as `SPECS` has them, with their partners; what is a spec already stays.

    Beside a ladder packed weights need no adapters to have something that trains.
    """
    alone = [name for name in names if not ("ladder" in names and name in ("int8", "nf4"))]
    partners = [partner for name in alone for partner in PARTNERS.get(name, [])]
    return [SPECS.get(name, name) for name in dict.fromkeys([*names, *partners])]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyFamily:
    """A transformers family: its config class, and how the config names its sizes."""

    config: str
    brings: str
    """What its structure has that matters to a strategy; the docs show it."""
    task: str = "AutoModelForCausalLM"
    images: bool = False
    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    intermediate: str | None = "intermediate_size"
    head_dim: str | None = None
    """Name of the size of one attention head, where it does not follow from the others."""
    values: Mapping[str, Any] = field(default_factory=dict)


_GROUPED = {"num_key_value_heads": 2}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

TINY_FAMILIES: Mapping[str, TinyFamily] = {
    "llama": TinyFamily(
        config="LlamaConfig",
        brings="grouped key and value heads, SwiGLU, no biases",
        values=_GROUPED,
    ),
    "gpt2": TinyFamily(
        config="GPT2Config",
        brings="fused QKV, transposed weights (Conv1D), biases, learned positions, tied head",
        hidden="n_embd",
        layers="n_layer",
        heads="n_head",
        intermediate=None,
        values={"bos_token_id": 0, "eos_token_id": 0},
    ),
    "bert": TinyFamily(
        config="BertConfig",
        brings="encoder, norms after the residual, a transform before a tied head with a bias",
        task="AutoModelForMaskedLM",
    ),
    "t5": TinyFamily(
        config="T5Config",
        brings="encoder and decoder, cross attention, relative positions, three tied names",
        task="AutoModelForSeq2SeqLM",
        hidden="d_model",
        layers="num_layers",
        heads="num_heads",
        intermediate="d_ff",
        head_dim="d_kv",
        values={"decoder_start_token_id": 0},
    ),
    "mixtral": TinyFamily(
        config="MixtralConfig",
        brings="experts in one three-dimensional weight, routing that depends on values",
        values={**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "vit": TinyFamily(
        config="ViTConfig",
        brings="images instead of text, a convolution before the layers, a classifier as the head",
        task="AutoModelForImageClassification",
        images=True,
        values={"image_size": _IMAGE_SIZE, "patch_size": 8},
    ),
    "qwen2": TinyFamily(
        config="Qwen2Config",
        brings="biases on queries, keys and values alone",
        values=_GROUPED,
    ),
    "qwen3": TinyFamily(
        config="Qwen3Config",
        brings="norms on queries and keys",
        head_dim="head_dim",
        values=_GROUPED,
    ),
    "mistral": TinyFamily(
        config="MistralConfig",
        brings="sliding-window attention in every layer",
        values={**_GROUPED, "sliding_window": 8},
    ),
    "gemma2": TinyFamily(
        config="Gemma2Config",
        brings="soft caps on attention and logits, every other layer a sliding window, tied head",
        head_dim="head_dim",
        values={**_GROUPED, **_IDS, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    "gemma3_text": TinyFamily(
        config="Gemma3TextConfig",
        brings="norms on queries and keys, two rotary tables, sliding windows, tied head",
        head_dim="head_dim",
        values={
            **_GROUPED,
            **_IDS,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window_pattern": 2,
        },
    ),
    "phi": TinyFamily(
        config="PhiConfig",
        brings="attention and MLP in parallel, a head with a bias, partial rotary positions",
        values=_IDS,
    ),
    "phi3": TinyFamily(
        config="Phi3Config",
        brings="fused QKV and fused gate and up projections",
        values={**_GROUPED, **_IDS},
    ),
    "opt": TinyFamily(
        config="OPTConfig",
        brings="learned positions with an offset, biases everywhere, tied head",
        intermediate="ffn_dim",
        values={**_IDS, "max_position_embeddings": 64},
    ),
    "roberta": TinyFamily(
        config="RobertaConfig",
        brings="encoder, positions counted from the padding, a head of its own with a tied bias",
        task="AutoModelForMaskedLM",
        values={**_IDS, "max_position_embeddings": 64},
    ),
    "gpt_neox": TinyFamily(
        config="GPTNeoXConfig",
        brings="fused QKV, attention and MLP in parallel, partial rotary positions",
        values=_IDS,
    ),
    "olmo2": TinyFamily(
        config="Olmo2Config",
        brings="norms after attention and MLP only, norms on whole queries and keys",
        values={**_GROUPED, **_IDS},
    ),
    "falcon": TinyFamily(
        config="FalconConfig",
        brings="fused QKV with one key and value head, attention and MLP in parallel, tied head",
        intermediate="ffn_hidden_size",
        values=_IDS,
    ),
    "deepseek_v3": TinyFamily(
        config="DeepseekV3Config",
        brings="low-rank attention, a dense first layer, shared and routed experts in groups",
        values={
            **_IDS,
            "num_key_value_heads": _HEADS,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}
"""Every transformers family that is held to the contract, by its `model_type`."""


class PlainModel(nn.Module):
    """A plain module with repeated blocks, as a person without transformers writes it."""

    def __init__(self, *, hidden: int = 32, layers: int = 4, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden),
                nn.Linear(hidden, 2 * hidden),
                nn.GELU(),
                nn.Linear(2 * hidden, hidden),
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(hidden, vocabulary)

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss of predicting `labels` [batch, tokens] at each position, and the logits."""
        hidden = self.embedding(input_ids)  # [batch, tokens, hidden]
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        logits = self.head(hidden)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return {"loss": loss, "logits": logits}


def _row(family: str) -> TinyFamily:
    if family not in TINY_FAMILIES:
        known = ", ".join([*TINY_FAMILIES, "plain"])
        raise ValueError(f"family={family!r}: use one of {known}")
    return TINY_FAMILIES[family]


def tiny_config(family: str, *, hidden: int = 32, layers: int = 4, **overrides: Any) -> Any:
    """The config of a tiny transformers model."""
    import transformers

    row = _row(family)
    sizes: dict[str, Any] = {row.hidden: hidden, row.layers: layers, row.heads: _HEADS}
    if row.intermediate is not None:
        sizes[row.intermediate] = 2 * hidden
    if row.head_dim is not None:
        sizes[row.head_dim] = hidden // _HEADS
    if not row.images:
        sizes |= {"vocab_size": VOCABULARY, "use_cache": False}
    return getattr(transformers, row.config)(**{**sizes, **row.values, **overrides})


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """A tiny model of a family: `hidden` and `layers`, and whatever its config takes."""
    with _default_dtype(dtype):
        return PlainModel(**overrides) if family == "plain" else _from_config(family, overrides)


def _from_config(family: str, overrides: dict[str, Any]) -> nn.Module:
    import transformers

    config = tiny_config(family, **overrides)
    auto = getattr(transformers, _row(family).task)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it prints generation configs
    try:
        model: nn.Module = auto.from_config(config)
    finally:
        transformers.logging.set_verbosity(before)
    return model


def tiny_batches(
    family: str, *, count: int = 1, seed: int = 0, batch: int = 2, length: int = 16
) -> list[dict[str, Tensor]]:
    """`count` micro-batches that a model can learn.

    Text: the next id is the id plus one; the last quarter of the second row is padding, masked in
    labels and attention. Images: the label says whether the image is dark or bright.
    """
    generator = torch.Generator().manual_seed(seed)
    if family != "plain" and _row(family).images:
        return [_images(generator, batch) for _ in range(count)]
    batches = []
    for _ in range(count):
        start = torch.randint(0, VOCABULARY, (batch, 1), generator=generator)
        ids = (start + torch.arange(length)) % VOCABULARY  # [batch, length]
        mask = torch.ones_like(ids)
        mask[1:2, length - length // 4 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def _images(generator: torch.Generator, batch: int) -> dict[str, Tensor]:
    labels = torch.arange(batch) % 2
    noise = torch.randn(batch, 3, _IMAGE_SIZE, _IMAGE_SIZE, generator=generator)
    return {"pixel_values": noise + (2 * labels - 1).view(-1, 1, 1, 1), "labels": labels}
