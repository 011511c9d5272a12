"""The global gradient norm and clipping, over `.grad` and what strategies keep elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from memrt.strategy import Attachment

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["clip_gradients", "gradient_norm", "has_hidden_gradients"]


def has_hidden_gradients(attachments: Sequence[Attachment]) -> bool:
    """Whether a strategy keeps gradients outside `.grad`."""
    base = Attachment.squared_gradient_norm
    return any(type(a).squared_gradient_norm is not base for a in attachments)


def gradient_norm(
    model: nn.Module, attachments: Sequence[Attachment], device: torch.device
) -> Tensor:
    """Global L2 norm of this step's gradient, hidden gradients included (0-dim fp32)."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = get_total_norm(gradients, foreach=True).float().to(device)
    hidden = [a.squared_gradient_norm() for a in attachments]
    squares = [square for square in hidden if square is not None]
    if not squares:
        return norm
    return torch.stack([norm.square(), *squares]).sum().sqrt()


def clip_gradients(
    model: nn.Module, attachments: Sequence[Attachment], device: torch.device, max_norm: float
) -> Tensor:
    """Scale every gradient so that the global norm is at most `max_norm`; returns the norm."""
    norm = gradient_norm(model, attachments, device)
    parameters = [p for p in model.parameters() if p.grad is not None]
    clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    if has_hidden_gradients(attachments):
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # torch's clipping formula
        for attachment in attachments:
            attachment.scale_gradients(factor)
    return norm
