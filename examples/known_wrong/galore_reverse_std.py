"""GaLore's `proj_type="reverse_std"` on a tall weight whose rank reaches its small side.

Which side was projected is guessed from the low-rank tensor's shape on the way back, and the guess
is wrong there.
"""

from __future__ import annotations

import torch
from common import require, verdict


def main() -> None:
    require("galore_torch", distribution="galore-torch")
    from galore_torch import GaLoreAdamW

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(16, 32))
    group = {"rank": 16, "update_proj_gap": 200, "scale": 1.0, "proj_type": "reverse_std"}
    optimizer = GaLoreAdamW([{"params": [weight], **group}], lr=1e-2)
    weight.grad = torch.randn(16, 32)
    still_there, seen = False, "a step of a 16 x 32 weight at rank 16 works"
    try:
        optimizer.step()
    except RuntimeError as error:
        still_there, seen = True, f"a 16 x 32 weight at rank 16 raises RuntimeError: {error}"
    verdict(still_there, packages=["galore-torch"], seen=seen)


if __name__ == "__main__":
    main()
