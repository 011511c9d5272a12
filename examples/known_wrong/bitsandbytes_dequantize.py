"""bitsandbytes on a CPU with AVX-512: NF4 comes back wrong where rows are no multiple of the block.

The kernel finds a row's scales by a floor division of the width by the block size.
"""

from __future__ import annotations

import sys

import torch
from common import MISSING, require, verdict


def relative_error(columns: int) -> float:
    """Of a weight [rows, columns] that went to NF4 and back."""
    from bitsandbytes import functional

    torch.manual_seed(0)
    weight = torch.randn(8, columns)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return float((functional.dequantize_4bit(codes, state) - weight).norm() / weight.norm())


def main() -> None:
    require("bitsandbytes", distribution="bitsandbytes")
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        print("this CPU has no AVX-512, whose kernel is the one that is wrong")
        sys.exit(MISSING)
    wrong, right = relative_error(160), relative_error(192)
    verdict(
        wrong > 2 * right,
        packages=["bitsandbytes"],
        seen=f"relative error {wrong:.3f} for rows of 160, {right:.3f} for rows of 192 (NF4's own "
        "is about 0.09)",
    )


if __name__ == "__main__":
    main()
