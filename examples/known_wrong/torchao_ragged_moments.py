"""torchao's AdamW in few bits: moments silently take the weight's dtype where blocks do not fit.

A parameter whose size is no multiple of the block (256, in 4 bits 128) keeps plain moments, made
like the weight: 4 bytes in place of 2 in bfloat16, where a second moment does not decay (see
`bfloat16_moments.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from common import require, verdict


def last_moment(kind: Any, num_elements: int, *, steps: int) -> torch.Tensor:
    """The second moment after one gradient of ones and then none."""
    weight = torch.nn.Parameter(torch.zeros(num_elements, dtype=torch.bfloat16))
    optimizer = kind([weight], lr=1e-3)
    for step in range(1 + steps):
        weight.grad = torch.ones_like(weight) if step == 0 else torch.zeros_like(weight)
        optimizer.step()
    moment: torch.Tensor = optimizer.state[weight]["exp_avg_sq"]
    return moment


def main() -> None:
    require("torchao", distribution="torchao")
    from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

    seen, wrong = [], []
    with torch.compiler.set_stance("force_eager"):  # the same formula, and no compiler is needed
        for kind in (AdamWFp8, AdamW8bit, AdamW4bit):
            fits = float(last_moment(kind, 8192, steps=1000).dequantize()[0])
            ragged = last_moment(kind, 8193, steps=1000)
            wrong.append(ragged.dtype is torch.bfloat16 and float(ragged[0]) > 2 * fits)
            seen.append(f"{kind.__name__} {fits:.2g} and {float(ragged[0]):.2g} ({ragged.dtype})")
    verdict(
        all(wrong),
        packages=["torch", "torchao"],
        seen="second moments of 8,192 and 8,193 bfloat16 weights, 1,000 steps after a gradient "
        f"(exactly: {1e-3 * 0.999**1000:.2g}): {', '.join(seen)}",
    )


if __name__ == "__main__":
    main()
