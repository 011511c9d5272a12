"""Linear layers whose frozen weight is kept packed: what `nf4` and `int8` share.

A layer's weight becomes one flat uint8 parameter of the same name (codes and scales, see the
format's kernel), and the layer a subclass of its class that makes the dense weight for each
product. It stays an `nn.Linear` to everyone who asks: transformers' `Conv1D` becomes one too. So
adapters are put on it as on any linear layer, and checkpoints hold the packed tensor as it is.

Packing rounds. `unpack` gives a layer its class and a dense weight back, with the rounded values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from memrt.kernels.frozen_linear import frozen_linear
from memrt.structure import is_plain_linear
from memrt.surgery import subclass_of
from memrt.weight_readers import reader_of

if TYPE_CHECKING:
    from memrt.structure import Facts

__all__ = [
    "PackedFormat",
    "PackedLinear",
    "dense_weight",
    "is_packed",
    "note_packed",
    "pack",
    "packable",
    "packable_weights",
    "packed_layers",
    "unpack",
]


DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What every format can make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """How a weight [rows, columns] becomes one uint8 tensor and back.

    `axis` is the dimension of the weight that counts a layer's outputs: 0, or 1 for `Conv1D`.
    """

    name: str
    pack: Callable[[Tensor, int], Tensor]
    dense: Callable[[Tensor, tuple[int, ...], int, torch.dtype], Tensor]


class PackedLinear:
    """What a linear layer with a packed weight is, besides its own class."""

    plain_class: ClassVar[type[nn.Module]]
    packed_format: ClassVar[PackedFormat]
    output_axis: ClassVar[int]

    weight: nn.Parameter  # uint8 [bytes]
    bias: nn.Parameter | None
    dense_shape: tuple[int, ...]
    dense_dtype: torch.dtype

    def dense(self, packed: Tensor) -> Tensor:
        """The weight, in the shape and dtype that it had."""
        form = self.packed_format
        return form.dense(packed, self.dense_shape, self.output_axis, self.dense_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to(dtype)` and `half()` say in which dtype the weight is made, as of a dense layer."""
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        wanted = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        if wanted in DENSE_DTYPES:
            self.dense_dtype = wanted
        return result

    def forward(self, x: Tensor) -> Tensor:
        """`F.linear` with the dense weight."""
        in_out = self.output_axis == 1
        return frozen_linear(x, self.weight, self.bias, self.dense, weight_is_in_out=in_out)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' `Conv1D` (GPT-2): y = x W + b with W [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@cache
def _packed_class(kind: type[nn.Module], form: PackedFormat) -> type[nn.Module]:
    linear = issubclass(kind, nn.Linear)
    # a Conv1D too is an nn.Linear from now on: its weight no longer tells its size
    bases = PackedLinear if linear else type("PackedConv1D", (PackedLinear, nn.Linear), {})
    return subclass_of(
        kind,
        bases,
        attributes={
            "plain_class": kind,
            "packed_format": form,
            "output_axis": 0 if linear else 1,
        },
    )


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a packed weight."""
    return isinstance(module, PackedLinear)


def packed_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The packed layers of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if is_packed(module)]


def dense_weight(module: nn.Module) -> Tensor:
    """A linear layer's weight: its own, or a new dense tensor when it is packed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return module.dense(weight.detach()) if isinstance(module, PackedLinear) else weight


def pack(form: PackedFormat, module: nn.Module) -> type[nn.Module]:
    """Pack a layer's weight in place, and return the class that the layer must take.

    The parameter stays the same object: whoever remembers it does not keep the dense weight alive.
    """
    parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    packed = form.pack(parameter.detach(), 1 if is_conv1d(module) else 0)
    shape, dtype = tuple(parameter.shape), parameter.dtype
    parameter.requires_grad_(False)
    parameter.data = packed
    return note_packed(form, module, shape, dtype)


def note_packed(
    form: PackedFormat, module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> type[nn.Module]:
    """Note what a layer's packed weight was, and return the class that the layer must take."""
    state: Any = module
    state.dense_shape, state.dense_dtype = shape, dtype
    if is_conv1d(module):
        state.in_features, state.out_features = shape
    kind: Any = type(module)
    return _packed_class(kind, form)


@torch.no_grad()
def unpack(module: nn.Module) -> None:
    """Give a layer its class and a dense weight back."""
    state: Any = module
    assert isinstance(state, PackedLinear)
    state.weight.data = state.dense(state.weight.detach())
    kind, conv1d = state.plain_class, state.output_axis == 1
    for name in ("dense_shape", "dense_dtype", *(("in_features", "out_features") * conv1d)):
        delattr(module, name)
    module.__class__ = kind


def packable(facts: Facts, *, head: bool = False, keep: tuple[str, ...] = ()) -> list[str]:
    """Names of the linear layers that are to be packed: the frozen ones, where there are any."""
    found = packable_weights(facts, head=head, keep=keep)
    frozen = [name for name, weight in found.items() if not weight.requires_grad]
    return frozen or list(found)


def packable_weights(
    facts: Facts, *, head: bool = False, keep: tuple[str, ...] = ()
) -> dict[str, nn.Parameter]:
    """Weights that can be packed, by their layers' names: of the repeated layers, and the head.

    Not those with a forward of their own, tied ones, nor what a family keeps in fp32 or reads
    itself: the dtype of the weight (T5's `wo`), or the weight (Mamba's `dt_proj`).
    """
    model, structure = facts.model, facts.structure
    kept = (*keep, *(getattr(model, "_keep_in_fp32_modules", None) or ()))
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        inside = structure.layer_of(name) is not None or (head and name == structure.head)
        if (
            inside
            and _is_plain_linear(module)
            and isinstance(weight, nn.Parameter)
            and weight.is_floating_point()
            and f"{name}.weight" not in structure.tied
            and not any(part in kept for part in name.split("."))
            and reader_of(model, name) is None
        ):
            found[name] = weight
    return found


def _is_plain_linear(module: nn.Module) -> bool:
    return is_plain_linear(module) or (is_conv1d(module) and "forward" not in vars(module))
