"""A plain PyTorch loop under memory strategies: any `nn.Module`, your own data and loss.

python examples/plain_loop.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import memrt


class Reverser(nn.Module):
    """Blocks over an embedding; it learns to read a sequence backwards."""

    def __init__(self, *, vocabulary: int, hidden: int, num_layers: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.position = nn.Parameter(torch.randn(length, hidden) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden, nhead=4, dim_feedforward=4 * hidden, dropout=0.0, batch_first=True
            )
            for _ in range(num_layers)
        )
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of `ids` [batch, tokens]."""
        hidden = self.embedding(ids) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def main() -> None:
    """Train and print the loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    vocabulary, length, num_micro_batches = 64, 32, 2

    torch.manual_seed(0)
    model = Reverser(vocabulary=vocabulary, hidden=options.hidden, num_layers=6, length=length)
    run = memrt.prepare(
        model, ["lisa(layers=2, every=10)", "int8_states"], lr=3e-3, max_grad_norm=1.0
    )
    for step in range(options.steps):
        window = torch.randint(0, vocabulary, (num_micro_batches, 16, length))
        for index, ids in enumerate(window):  # the micro-batches of one optimizer step
            with run.micro_batch(last=index == num_micro_batches - 1):
                loss = cross_entropy(model(ids).flatten(0, 1), ids.flip(1).flatten())
                run.backward(loss / num_micro_batches)
        norm = run.step()  # clips, updates, clears the gradients
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  gradient norm {norm:.2f}")
    run.export()  # the model is plain again


if __name__ == "__main__":
    main()
