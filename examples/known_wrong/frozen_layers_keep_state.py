"""Switching layers on and off by `requires_grad` alone: the optimizer's state only grows.

This is what LISA callbacks do that ship with several trainers. torch's AdamW keeps the moments of
a parameter that no longer gets a gradient; after a while every layer has been on once.
"""

from __future__ import annotations

import torch
from common import verdict

NUM_LAYERS, ACTIVE, INTERVAL, STEPS = 16, 2, 20, 300


def main() -> None:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(NUM_LAYERS))
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3)
    shares = []
    for step in range(STEPS):
        if step % INTERVAL == 0:
            chosen = torch.randperm(NUM_LAYERS)[:ACTIVE].tolist()
            for index, layer in enumerate(layers):
                layer.requires_grad_(index in chosen)
        x = torch.randn(4, 32)
        for layer in layers:
            x = torch.relu(layer(x)) + x
        x.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        held = sum(
            tensor.nbytes
            for state in optimizer.state.values()
            for tensor in state.values()
            if tensor.ndim
        )
        shares.append(held / sum(2 * p.nbytes for p in layers.parameters()))
    at = {step: f"{shares[step - 1] * 100:.0f} %" for step in (1, 100, 200, 300)}
    verdict(
        shares[-1] > 2 * ACTIVE / NUM_LAYERS,
        packages=["torch"],
        seen=f"{ACTIVE} of {NUM_LAYERS} layers train at a time ({ACTIVE / NUM_LAYERS * 100:.0f} % "
        f"of AdamW's state); held at step: {at}",
    )


if __name__ == "__main__":
    main()
