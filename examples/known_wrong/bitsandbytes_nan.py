"""bitsandbytes on a CPU: a NaN goes into 8 bits as the most negative number of its block.

The largest magnitude is taken without it, and its code is 0, which the signed map reads as -0.993
of that. So a moment that a NaN gradient has spoilt reads as an ordinary number, of the wrong sign
and size. Its CUDA kernel, by its source, leaves such an element and its moments out.
"""

from __future__ import annotations

import torch
from common import require, verdict


def main() -> None:
    require("bitsandbytes", distribution="bitsandbytes")
    from bitsandbytes import functional
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = AdamW8bit([weight], lr=1e-3, weight_decay=0.0)
    weight.grad = torch.full((4096,), 0.5)
    weight.grad[5] = float("nan")
    optimizer.step()
    state = optimizer.state[weight]
    moment = float(state["qmap1"][int(state["state1"][5])] * state["absmax1"][0])
    values = torch.ones(256)
    values[5] = float("nan")
    back = functional.dequantize_blockwise(*functional.quantize_blockwise(values, blocksize=256))
    verdict(
        bool(torch.isfinite(back[5])) and moment < 0,
        packages=["torch", "bitsandbytes"],
        seen=f"the first moment after a gradient of 0.5 everywhere and one NaN: {moment:.3g} where "
        f"the NaN was, 0.05 elsewhere; NaN among ones comes back as {float(back[5]):.3g}",
    )


if __name__ == "__main__":
    main()
