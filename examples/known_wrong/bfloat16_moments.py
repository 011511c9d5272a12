"""torch's AdamW on bfloat16 weights: a second moment that does not decay, a state that is cast.

0.999 v rounds back to v in bfloat16, which has 8 bits: v remembers its largest gradient for ever.
And `load_state_dict` casts moments that were kept in float32 to the weight's dtype.
"""

from __future__ import annotations

import torch
from common import verdict


def main() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    first = float(optimizer.state[weight]["exp_avg_sq"][0])
    for _ in range(5000):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    last = float(optimizer.state[weight]["exp_avg_sq"][0])
    state = optimizer.state_dict()
    state["state"][0]["exp_avg_sq"] = torch.full((4,), 1.001)  # float32, as a careful one keeps it
    optimizer.load_state_dict(state)
    dtype = optimizer.state[weight]["exp_avg_sq"].dtype
    verdict(
        last > 0.5 * first or dtype is torch.bfloat16,
        packages=["torch"],
        seen=f"after 5,000 steps without gradient v went from {first:.4g} to {last:.4g} (exactly: "
        f"{first * 0.999**5000:.2g}); a float32 v was loaded as {dtype}",
    )


if __name__ == "__main__":
    main()
