"""Whether bitsandbytes computes NF4 on a device: its CUDA library must load too."""

from __future__ import annotations

from importlib.util import find_spec

import torch

__all__ = ["nf4_problem"]


def nf4_problem(device: torch.device) -> str | None:
    """Why bitsandbytes does not compute NF4 on this device; None where it does."""
    from memrt.kernels.nf4 import nf4_dequantize, nf4_quantize

    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    weight = torch.linspace(-1.0, 1.0, 256, device=device)
    try:
        back = nf4_dequantize(nf4_quantize(weight), weight.shape, weight.dtype)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # its CUDA library
        return f"{type(error).__name__}: {error}".splitlines()[0]
    off = float((back - weight).abs().max())
    return None if off <= 0.2 else f"bitsandbytes gives back weights that are {off:.2f} off"
