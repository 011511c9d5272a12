"""The global gradient norm and clipping, over `.grad` and what strategies keep elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from memrt.strategy import Attachment

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["clip_factor", "clip_gradients", "gradient_norm", "has_hidden_gradients"]


def has_hidden_gradients(attachments: Sequence[Attachment]) -> bool:
    """Whether a strategy keeps gradients outside `.grad`, or has applied some already."""
    doors = ("squared_gradient_norm", "gradient_norms")
    return any(
        getattr(type(a), d) is not getattr(Attachment, d) for a in attachments for d in doors
    )


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by (torch's formula), a 0-dim tensor."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def gradient_norm(
    model: nn.Module, attachments: Sequence[Attachment], device: torch.device
) -> Tensor:
    """Global L2 norm of this step's gradient, hidden gradients included (0-dim fp32)."""
    norm = _dense_norm(model, attachments, device).float()
    hidden = [a.squared_gradient_norm() for a in attachments]
    squares = [square for square in hidden if square is not None]
    if not squares:
        return norm
    return torch.stack([norm.square(), *squares]).sum().sqrt()


def _dense_norm(
    model: nn.Module, attachments: Sequence[Attachment], device: torch.device
) -> Tensor:
    """Over `.grad` and over what was there and has been applied, in the parameters' order."""
    applied = {p: norm for a in attachments for p, norm in a.gradient_norms().items()}
    if not applied:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return get_total_norm(gradients, foreach=True).to(device)
    norms = [
        applied[p] if p.grad is None else get_total_norm([p.grad], foreach=True)
        for p in model.parameters()
        if p in applied or p.grad is not None
    ]
    return get_total_norm([torch.stack([norm.to(device) for norm in norms])])


def clip_gradients(
    model: nn.Module, attachments: Sequence[Attachment], device: torch.device, max_norm: float
) -> Tensor:
    """Scale every gradient so that the global norm is at most `max_norm`; returns the norm."""
    norm = gradient_norm(model, attachments, device)
    parameters = [p for p in model.parameters() if p.grad is not None]
    clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    if has_hidden_gradients(attachments):
        factor = clip_factor(norm, max_norm)
        for attachment in attachments:
            attachment.scale_gradients(factor)
    return norm
