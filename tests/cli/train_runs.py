"""Tiny runs of `memrt train`: a model folder, data files, and the words for a short run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

SHORT = [
    *("--seq", "24"),
    *("--batch", "2"),
    *("--lr", "5e-3"),
    *("--logging-steps", "1"),
    *("--save-steps", "2"),
    *("--use-cpu",),
]


def write_model(folder: Path, **overrides: object) -> str:
    """A folder with a config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **overrides}))
    return str(folder)


def write_text(path: Path, *, num_lines: int = 60) -> str:
    """Sums in words: short, and learnable within a few steps."""
    lines = [f"{n} and {n + 1} are {2 * n + 1}, says line {n}." for n in range(num_lines)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_pairs(path: Path, *, num_lines: int = 24) -> str:
    """Prompts and completions of unequal lengths."""
    rows = [
        {"question": f"{n} + {n}?", "answer": " is".join(["it"] * (n % 5 + 1)) + f" {2 * n}"}
        for n in range(num_lines)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a finished run."""
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def assert_equal_weights(actual: Path, expected: Path) -> None:
    """Bit for bit."""
    got, wanted = weights(actual), weights(expected)
    assert got.keys() == wanted.keys()
    assert len(wanted) > 10
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
