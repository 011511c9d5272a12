"""Products and sums of low-precision tensors that end in fp32, with bounded temporaries.

PyTorch's in-place operators want one dtype: a bf16 product cannot be added into an fp32 sum, nor a
bf16 gradient be multiplied by an fp32 number, without a full-size copy or a rounded factor. Here
they go piece by piece: a temporary has at most BLOCK_ELEMENTS elements (128 MiB in fp32) or an
eighth of what it stands for, whichever is more.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK_ELEMENTS", "add_product_", "block_rows", "product_dtype", "scaled"]

# A bound on workspace, not tuned: large enough for a GPU to be busy, small beside any vocabulary.
BLOCK_ELEMENTS = 2**25
# More pieces than this would cost more launches than they save bytes.
MAX_PIECES = 8


def block_rows(row_elements: int, num_rows: int = 0) -> int:
    """Return how many of ``num_rows`` rows of ``row_elements`` elements are worked on at once."""
    return max(1, BLOCK_ELEMENTS // max(1, row_elements), -(-num_rows // MAX_PIECES))


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which ``F.linear`` multiplies ``tensor``: autocast's, or its own."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def add_product_(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add rowsᵀ @ columns to ``total`` [r, c], for rows [n, r] and columns [n, c] of one dtype."""
    if total.dtype == rows.dtype:
        total.addmm_(rows.t(), columns)
        return
    tile_rows = block_rows(total.shape[1], total.shape[0])
    tiles = zip(torch.split(total, tile_rows), torch.split(rows, tile_rows, dim=1), strict=True)
    for tile, row_tile in tiles:
        tile.add_(torch.mm(row_tile.t(), columns))


def scaled(
    tensor: Tensor, factor: Tensor, *, in_place: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``tensor * factor`` in ``dtype``, multiplied in the dtype of the 0-dim ``factor``.

    ``in_place`` overwrites ``tensor`` where the dtype stays the same, and is no promise otherwise.
    """
    same = dtype is None or dtype == tensor.dtype
    out = tensor if in_place and same else torch.empty_like(tensor, dtype=dtype)
    if out.dtype == tensor.dtype == factor.dtype:
        return torch.mul(tensor, factor, out=out)
    # On a GPU a 0-dim factor is first cast to the dtype of what it multiplies: 1/3 would be rounded
    # to bf16, and a gradient scaler's 65536 overflow in float16.
    rows = block_rows(tensor[:1].numel(), tensor.shape[0])
    for source, target in zip(torch.split(tensor, rows), torch.split(out, rows), strict=True):
        target.copy_(source.to(factor.dtype, copy=True).mul_(factor))
    return out
