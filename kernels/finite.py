"""Whether every element of some tensors is a finite number: one pass over them, and one answer.

Or, for who squares them, a number whose magnitude is below a bound: at the same price.

The answer is read on the host, because what follows is done or left out as a whole; on CUDA that
waits for the device once. Under fake tensors, which have no values, the answer is yes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

__all__ = ["all_finite"]


@torch.library.custom_op("memrt::all_finite", mutates_args=())
def all_finite(tensors: Sequence[Tensor], below: float | None = None) -> bool:
    """True where every magnitude is less than `below`, or is finite; of no element at all, too."""
    limit = torch.inf if below is None else below
    known = [tensor for tensor in tensors if tensor.numel()]
    # the largest magnitude is a number of the tensor itself: it cannot overflow, as a sum would
    on_cpu = [tensor for tensor in known if tensor.device.type == "cpu"]
    if on_cpu:  # where the infinity norm takes 10 (fp64) to 24 times (fp32) as long as both ends
        ends = [end.double() for tensor in on_cpu for end in torch.aminmax(tensor)]
        if not (torch.stack(ends).abs() < limit).all():
            return False
    others = [tensor for tensor in known if tensor.device.type != "cpu"]
    return bool(get_total_norm(others, norm_type=torch.inf) < limit) if others else True


@all_finite.register_fake
def _(tensors: Sequence[Tensor], below: float | None = None) -> bool:
    return True
