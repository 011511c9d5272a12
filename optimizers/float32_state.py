"""fp32 moments: torch's fused AdamW where it takes a parameter, fp32 copies of pieces elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from memrt.optimizers.state_format import AdamWSettings, StateFormat, StateTensor, Update

__all__ = ["Float32"]

# fp32 copies of half-precision tensors are made for so many elements at a time (32 MiB for two), or
# for a sixteenth of the parameter, whichever is more: small pieces of large weights cost launches
PIECE_ELEMENTS = 2**22
MAX_PIECES = 16


class Float32(StateFormat):
    """Two fp32 moments: 8 bytes an element.

    fp32 parameters are stepped by torch's fused kernel, all of a group at once, without temporaries
    and with its bits. Other dtypes, and layouts that are not contiguous (where the fused kernel can
    be wrong), are stepped through temporary fp32 copies of parameter and gradient, 8 bytes an
    element, of `PIECE_ELEMENTS` elements at a time, or of a sixteenth of the parameter where that
    is more: 250 MiB for 128256 x 4096. What is not contiguous is copied whole.
    """

    name: ClassVar[str] = "float32"

    def layout(self, shape: Sequence[int]) -> dict[str, StateTensor]:
        """`step`, `exp_avg`, `exp_avg_sq`: torch's names; all on the parameter's device."""
        return {
            "step": StateTensor((), torch.float32),
            "exp_avg": StateTensor(tuple(shape), torch.float32),
            "exp_avg_sq": StateTensor(tuple(shape), torch.float32),
        }

    def adamw(self, updates: Sequence[Update], settings: AdamWSettings) -> None:
        """One fused call for what it can take, copies for the rest."""
        direct = [u for u in updates if _is_plain(u.parameter) and _is_plain(u.gradient)]
        if direct:
            _fused(
                [u.parameter for u in direct],
                [u.gradient for u in direct],
                [u.state["exp_avg"] for u in direct],
                [u.state["exp_avg_sq"] for u in direct],
                [u.state["step"] for u in direct],
                settings,
            )
        for update in updates:
            if not (_is_plain(update.parameter) and _is_plain(update.gradient)):
                _through_copies(update, settings)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_contiguous()


def _fused(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    settings: AdamWSettings,
) -> None:
    adamw(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        maximize=False,
    )


def _through_copies(update: Update, settings: AdamWSettings) -> None:
    first_index = 0
    for piece in _pieces(update):
        _piece_through_copies(piece, update, settings, first_index)
        first_index += piece[0].numel()
    update.state["step"].add_(1)


def _piece_through_copies(
    piece: tuple[Tensor, Tensor, Tensor, Tensor],
    update: Update,
    settings: AdamWSettings,
    first_index: int,
) -> None:
    parameter, gradient, exp_avg, exp_avg_sq = piece
    weight = _plain(parameter)
    # the fused kernel counts the step that it is given, and a parameter has many pieces
    step = update.state["step"].clone()
    _fused([weight], [_plain(gradient)], [exp_avg], [exp_avg_sq], [step], settings)
    if weight is parameter:
        return
    if update.rounding_key is not None and parameter.dtype is torch.bfloat16:
        rounding = Rounding(update.rounding_key, step)
        stochastic_copy_(parameter, weight, rounding=rounding, first_index=first_index)
    else:
        parameter.copy_(weight)


def _plain(tensor: Tensor) -> Tensor:
    if _is_plain(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device).copy_(tensor)


def _pieces(update: Update) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Parameter, gradient and moments, in at most `MAX_PIECES` pieces."""
    parameter, gradient, state, _ = update
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]  # always contiguous
    if not (parameter.is_contiguous() and gradient.is_contiguous()):
        yield parameter, gradient, exp_avg, exp_avg_sq
        return
    p, g, m, v = (t.detach().view(-1) for t in (parameter, gradient, exp_avg, exp_avg_sq))
    size = max(PIECE_ELEMENTS, -(-p.numel() // MAX_PIECES))
    for start in range(0, p.numel(), size):
        part = slice(start, start + size)
        yield p[part], g[part], m[part], v[part]
