"""What memrt trains when the user names nothing: a small Llama from a config, no download.

Llama with 8 layers, hidden 256, vocabulary 4096, untied head: 8,917,248 parameters,
36 MB of weights in fp32. The text is CPython's own `pydoc_data.topics`, the tokenizer a byte-level
BPE trained on it (`memrt.data`).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

__all__ = ["MODEL_NAME", "VOCABULARY", "embedded_config", "embedded_tokenizer"]

MODEL_NAME = "embedded Llama"
VOCABULARY = 4096


def embedded_config() -> LlamaConfig:
    """The embedded model's config."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        # ids of the embedded tokenizer
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@cache
def embedded_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the embedded text; takes about a second the first time."""
    from memrt.tokenization import byte_level_tokenizer, embedded_text

    return byte_level_tokenizer(embedded_text(), vocabulary)
