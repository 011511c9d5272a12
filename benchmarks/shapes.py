"""Llama shapes by size, from configs: no weights are downloaded, random ones are drawn.

Sizes are parameters in units of 10^9. 1B is TinyLlama's shape, 3B Llama 3.2's (tied head), 8B and
70B Llama 3's, 13B Llama 2's; the smaller ones keep their proportions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

__all__ = ["SHAPES", "llama_config"]


def _shape(
    hidden: int,
    mlp: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    *,
    tied: bool = False,
) -> dict[str, Any]:
    """`heads` are query heads and key-value heads."""
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape(64, 128, 7, (4, 2), 199),
    "0.004B": _shape(256, 768, 4, (4, 4), 4096),
    "0.01B": _shape(256, 768, 8, (4, 4), 8192),
    "0.03B": _shape(512, 1408, 8, (8, 4), 8192),
    "0.1B": _shape(768, 2048, 12, (12, 12), 32_000),
    "0.5B": _shape(1280, 3456, 24, (20, 20), 32_000),
    "1B": _shape(2048, 5632, 22, (32, 4), 32_000),
    "3B": _shape(3072, 8192, 28, (24, 8), 128_256, tied=True),
    "8B": _shape(4096, 14_336, 32, (32, 8), 128_256),
    "13B": _shape(5120, 13_824, 40, (40, 40), 32_000),
    "70B": _shape(8192, 28_672, 80, (64, 8), 128_256),
}


def llama_config(size: str) -> LlamaConfig:
    """The config of a size in `SHAPES`."""
    from transformers import LlamaConfig

    if size not in SHAPES:
        raise ValueError(f"size={size!r} is unknown; use one of {', '.join(SHAPES)}")
    return LlamaConfig(**SHAPES[size], max_position_embeddings=8192, use_cache=False)
