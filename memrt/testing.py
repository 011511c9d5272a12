"""Tiny models and batches of every family, for the tests of memrt and of third-party strategies.

Models have a few thousand parameters, are built from configs, and take well under a second a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FAMILIES", "VOCABULARY", "PlainModel", "tiny_batches", "tiny_config", "tiny_model"]

FAMILIES = ("llama", "gpt2", "bert", "plain")
VOCABULARY = 99


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


def tiny_config(family: str, *, hidden: int = 32, layers: int = 4, **overrides: Any) -> Any:
    """The config of a tiny transformers model."""
    import transformers

    common = {"vocab_size": VOCABULARY, "use_cache": False, **overrides}
    if family == "llama":
        return transformers.LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            **common,
        )
    if family == "gpt2":
        return transformers.GPT2Config(
            n_embd=hidden, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0, **common
        )
    if family == "bert":
        return transformers.BertConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            **common,
        )
    raise ValueError(f"family={family!r}: use one of {', '.join(FAMILIES)}")


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
    auto = (
        transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    )
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
    """`count` micro-batches of ids that a model can learn: the next id is the id plus one.

    The last quarter of the second row is padding, masked in labels and attention.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        start = torch.randint(0, VOCABULARY, (batch, 1), generator=generator)
        ids = (start + torch.arange(length)) % VOCABULARY  # [batch, length]
        mask = torch.ones_like(ids)
        mask[1:2, length - length // 4 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches
