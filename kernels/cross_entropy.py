"""Cross entropy of a block of logits that becomes its own gradient, in place.

Formula, for a row Z of logits [vocab], label y, scale s and soft-capping c (None: L = s · Z):

    L = c · tanh(s · Z / c),   loss = logsumexp(L) - L[y],
    dZ = s · (softmax(L) - onehot(y)) · (1 - (L / c)²)

and zero for both where y is ``ignore_index``. Arithmetic is fp32 at least, whatever the dtype of
the logits.

Bytes: the logits themselves, and temporaries over at most BLOCK_ELEMENTS logits at a time: one
fp32 copy of low-precision logits, and one more for the slope of tanh. Everything else is [rows].
Autograd's cross entropy keeps 4 bytes a logit for its backward and makes as many again there.

Source: the in-place gradient is Liger Kernel's (arXiv 2410.10989), soft-capping Gemma 2's (arXiv
2408.00118).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from memrt.kernels.mixed_precision import block_rows

__all__ = ["cross_entropy_"]


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    *,
    row_scale: Tensor | None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the summed loss of ``logits`` [rows, vocab]; leave ``row_scale * dZ`` in their place.

    ``row_scale`` [rows] must be zero at ignored labels. With None no gradient is formed, and the
    logits are left overwritten by nothing of use.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.zeros((), dtype=dtype, device=logits.device)
    rows = block_rows(logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        block = slice(start, start + rows)
        loss += _block_(
            logits[block],
            labels[block],
            row_scale=None if row_scale is None else row_scale[block],
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
        )
    return loss


def _block_(
    logits: Tensor,
    labels: Tensor,
    *,
    row_scale: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    # [rows, vocab]; the logits themselves where they are wide enough.
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tangent = None
    if softcap is not None:
        tangent = values.mul_(logit_scale / softcap).tanh_()
        values = tangent * softcap if row_scale is not None else tangent.mul_(softcap)
    elif logit_scale != 1.0:
        values.mul_(logit_scale)
    values.sub_(values.amax(dim=1, keepdim=True))
    # Not a gather: this refuses labels outside the vocabulary as every PyTorch loss does.
    label_terms = functional.nll_loss(values, labels, ignore_index=ignore_index, reduction="none")
    total = values.exp_().sum(dim=1)  # [rows]
    valid = labels != ignore_index
    losses = torch.where(valid, total.log() + label_terms, torch.zeros_like(total))
    if row_scale is not None:
        row_scale = row_scale * logit_scale
        index = torch.where(valid, labels, torch.zeros_like(labels)).unsqueeze(1)  # [rows, 1]
        values.mul_((row_scale / total).unsqueeze(1))
        values.scatter_(1, index, values.gather(1, index) - row_scale.unsqueeze(1))
        if tangent is not None:
            values.mul_(tangent.square_().neg_().add_(1.0))
        if values is not logits:
            logits.copy_(values)
    return losses.sum()
