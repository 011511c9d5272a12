"""Layer-wise GaLore with gradient accumulation: the README's hook steps on every micro-batch.

transformers refuses the combination; GaLore's own training script, whose hook this is, does not.
"""

from __future__ import annotations

import torch
from common import require, verdict


def moved(num_micro_batches: int) -> float:
    """How far one optimizer step's gradient takes a weight, in as many micro-batches."""
    from galore_torch import GaLoreAdamW

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 32))
    gradient = torch.randn(16, 32)
    group = {"rank": 16, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
    optimizer = GaLoreAdamW([{"params": [weight], **group}], lr=1e-2)

    def step(parameter: torch.Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    weight.register_post_accumulate_grad_hook(step)
    for _ in range(num_micro_batches):
        (weight * gradient / num_micro_batches).sum().backward()
    return float(weight.detach().norm())


def main() -> None:
    require("galore_torch", distribution="galore-torch")
    ratio = moved(4) / moved(1)
    verdict(
        ratio > 1.01,
        packages=["galore-torch"],
        seen=f"the same gradient in 4 micro-batches moves the weight {ratio:.2f} times as far",
    )


if __name__ == "__main__":
    main()
