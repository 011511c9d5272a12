"""transformers' Trainer adds up a classifier's losses over micro-batches instead of averaging them.

A model whose forward takes further keyword arguments is taken for one that divides its loss by the
number of items in the whole step. A classifier takes them and returns a mean over its micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from common import folder, gradient_norms, trainer, verdict


def tiny_bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def examples() -> list[dict[str, Any]]:
    rows = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": int(row[0] > 31)} for row in rows]


def gradient_norm(*, batch: int, accumulation: int) -> float:
    """Of the first step over the same eight rows."""
    run = trainer(
        folder(),
        tiny_bert(),
        rows=examples(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=1e9,
        save_strategy="no",
    )
    run.train()
    return gradient_norms(run)[0]


def main() -> None:
    whole, parts = gradient_norm(batch=8, accumulation=1), gradient_norm(batch=2, accumulation=4)
    verdict(
        parts > 1.5 * whole,
        packages=["transformers"],
        seen=f"the gradient of 8 rows is {parts / whole:.2f} times as long in 4 micro-batches "
        "as in one",
    )


if __name__ == "__main__":
    main()
