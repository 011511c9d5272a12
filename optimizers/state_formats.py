"""State formats: what an optimizer keeps of its moments between two steps, and in how many bytes.

| format  | an element is kept as                                     | bytes an element    |
|---------|-----------------------------------------------------------|---------------------|
| float32 | two fp32 moments                                          | 8                   |
| int8    | two codes, and two fp32 scales a block of 256 elements    | 2 + 8 / 256 = 2.03  |

plus one fp32 step counter a parameter. Every format is a layout of plain tensors; a step turns them
into fp32 moments, updates in fp32 whatever the parameter's dtype, and keeps them again. Moments are
never bf16: there v * 0.999 rounds back to v, and the effective learning rate decays silently.

int8 leaves parameters with fewer than 4096 elements in fp32 (bitsandbytes' rule: norms and biases
are where 8 bits hurt, and are few). It costs 2 KiB a device for its code maps. Small elements of a
block lose precision to its largest: rows of an embedding that are rarely met feel it most.

Sources: Loshchilov and Hutter, arXiv 1711.05101 (AdamW); Dettmers et al., arXiv 2110.02861 (int8).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from memrt.kernels.adamw_int8 import adamw_int8
from memrt.kernels.dynamic_map import dynamic_map, num_blocks

__all__ = [
    "MIN_INT8_ELEMENTS",
    "STATE_FORMATS",
    "AdamWSettings",
    "Float32",
    "Int8",
    "StateFormat",
    "StateTensor",
    "Update",
]

MIN_INT8_ELEMENTS = 4096
# fp32 copies of half-precision tensors are made for so many elements at a time (32 MiB for two), or
# for a sixteenth of the parameter, whichever is more: small pieces of large weights cost launches
PIECE_ELEMENTS = 2**22
MAX_PIECES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """The numbers of one step of one parameter group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class StateTensor(NamedTuple):
    """What one tensor of a state must look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool = False


class Update(NamedTuple):
    """One parameter's share of a step: updated in place, parameter and state."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


class StateFormat(ABC):
    """How moments are kept. One object serves all parameters of an optimizer."""

    name: ClassVar[str]
    min_elements: ClassVar[int] = 0
    """Smaller parameters keep float32 state."""

    @abstractmethod
    def layout(self, shape: Sequence[int]) -> dict[str, StateTensor]:
        """The tensors that the state of moments of this shape is made of."""

    @abstractmethod
    def adamw(self, updates: Sequence[Update], settings: AdamWSettings) -> None:
        """One AdamW step on each of them."""

    def create(self, shape: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The state before the first step: zeros."""
        return {
            key: torch.zeros(
                tensor.shape, dtype=tensor.dtype, device="cpu" if tensor.on_host else device
            )
            for key, tensor in self.layout(shape).items()
        }

    def check(self, state: Mapping[str, Tensor], shape: Sequence[int], *, owner: str) -> None:
        """Refuse a state that is not this format's for moments of this shape."""
        layout = self.layout(shape)
        if state.keys() != layout.keys():
            raise ValueError(
                f"the state of {owner} holds {sorted(state)}, expected {sorted(layout)}; use the "
                "state format and the projections that it was made with"
            )
        for key, expected in layout.items():
            tensor = state[key]
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise ValueError(
                    f"{key} of {owner} is {tuple(tensor.shape)} {tensor.dtype}, expected "
                    f"{expected.shape} {expected.dtype}; use the state of the same model and "
                    "projections"
                )

    def load(
        self,
        state: Mapping[str, Tensor],
        shape: Sequence[int],
        device: torch.device,
        *,
        owner: str,
    ) -> dict[str, Tensor]:
        """A saved state, checked, in its own dtypes, where this format keeps it."""
        self.check(state, shape, owner=owner)
        return {
            key: state[key].to("cpu" if tensor.on_host else device)
            for key, tensor in self.layout(shape).items()
        }

    def state_bytes(self, shape: Sequence[int]) -> int:
        """The bytes of one parameter's state."""
        return sum(prod(t.shape) * t.dtype.itemsize for t in self.layout(shape).values())

    def shared_tensors(self) -> list[Tensor]:
        """Tensors that exist once, beside the parameters' states."""
        return []


class Float32(StateFormat):
    """Two fp32 moments: 8 bytes an element.

    fp32 parameters are stepped by torch's fused kernel, all of a group at once, without temporaries
    and with its bits. Other dtypes, and layouts that are not contiguous (where the fused kernel can
    be wrong), are stepped through temporary fp32 copies of parameter and gradient, 8 bytes an
    element, of at most `PIECE_ELEMENTS` elements at a time (a non-contiguous parameter: whole).
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


class Int8(StateFormat):
    """Block-wise 8-bit moments: 2.03 bytes an element, see `memrt.kernels.adamw_int8`."""

    name: ClassVar[str] = "int8"
    min_elements: ClassVar[int] = MIN_INT8_ELEMENTS

    def __init__(self) -> None:
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def layout(self, shape: Sequence[int]) -> dict[str, StateTensor]:
        """Codes of the moments' shape, scales [num_blocks]; the step is read, so on the host."""
        blocks = (num_blocks(prod(shape)),)
        return {
            "step": StateTensor((), torch.float32, on_host=True),
            "exp_avg_codes": StateTensor(tuple(shape), torch.uint8),
            "exp_avg_sq_codes": StateTensor(tuple(shape), torch.uint8),
            "exp_avg_scales": StateTensor(blocks, torch.float32),
            "exp_avg_sq_scales": StateTensor(blocks, torch.float32),
        }

    def adamw(self, updates: Sequence[Update], settings: AdamWSettings) -> None:
        """One call of the operator for each parameter."""
        for parameter, gradient, state in updates:
            exp_avg_map, exp_avg_sq_map = self._maps_on(parameter.device)
            state["step"].add_(1)
            adamw_int8(
                parameter,
                gradient,
                state["exp_avg_codes"],
                state["exp_avg_sq_codes"],
                state["exp_avg_scales"],
                state["exp_avg_sq_scales"],
                exp_avg_map,
                exp_avg_sq_map,
                state["step"],
                settings.lr,
                settings.beta1,
                settings.beta2,
                settings.eps,
                settings.weight_decay,
            )

    def shared_tensors(self) -> list[Tensor]:
        """The code maps: 2 KiB for each device that was stepped on."""
        return [code_map for maps in self._maps.values() for code_map in maps]

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._maps:
            self._maps[device] = (
                torch.tensor(dynamic_map(signed=True), device=device),
                torch.tensor(dynamic_map(signed=False), device=device),
            )
        return self._maps[device]


STATE_FORMATS: dict[str, type[StateFormat]] = {"float32": Float32, "int8": Int8}


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
    for piece in _pieces(update):
        _piece_through_copies(piece, update.state["step"], settings)
    update.state["step"].add_(1)


def _piece_through_copies(
    piece: tuple[Tensor, Tensor, Tensor, Tensor], step: Tensor, settings: AdamWSettings
) -> None:
    parameter, gradient, exp_avg, exp_avg_sq = piece
    weight = _plain(parameter)
    # the fused kernel counts the step that it is given, and a parameter has many pieces
    _fused([weight], [_plain(gradient)], [exp_avg], [exp_avg_sq], [step.clone()], settings)
    if weight is not parameter:
        parameter.copy_(weight)


def _plain(tensor: Tensor) -> Tensor:
    if _is_plain(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device).copy_(tensor)


def _pieces(update: Update) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Parameter, gradient and moments, in at most `MAX_PIECES` pieces."""
    parameter, gradient, state = update
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]  # always contiguous
    if not (parameter.is_contiguous() and gradient.is_contiguous()):
        yield parameter, gradient, exp_avg, exp_avg_sq
        return
    p, g, m, v = (t.detach().view(-1) for t in (parameter, gradient, exp_avg, exp_avg_sq))
    size = max(PIECE_ELEMENTS, -(-p.numel() // MAX_PIECES))
    for start in range(0, p.numel(), size):
        part = slice(start, start + size)
        yield p[part], g[part], m[part], v[part]
