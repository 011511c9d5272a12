"""What adapters learned, added to the weights of the layers that carry them.

A layer is folded in float32, so that W + ΔW is rounded once to the weights' dtype. A module that
PEFT trained whole (`modules_to_save`) takes the values of its trained copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memrt.adapters import ADAPTER_NAME, adapter_layers, saved_modules
from memrt.packed_weights import is_conv1d, is_packed, unpack

__all__ = ["fold_adapters", "fold_layer", "tied_weight", "trained_copies"]


@torch.no_grad()
def fold_adapters(model: nn.Module) -> None:
    """Add what the adapters learned to the layers' own weights; packed ones become dense.

    A layer is folded in float32, so that W + ΔW is rounded once to the weights' dtype.
    """
    _refuse_tied(model)
    for name, layer in adapter_layers(model):
        base = layer.get_base_layer()
        if is_packed(base):
            unpack(base)
            base.weight.requires_grad_(True)
            if is_conv1d(base):
                layer.fan_in_fan_out = True  # PEFT saw a linear layer, whose weight is [out, in]
        dtypes = {part: p.dtype for part, p in base.named_parameters(recurse=False)}
        for part, dtype in dtypes.items():
            base._parameters[part].data = base._parameters[part].to(_wide(dtype))
        fold_layer(name, layer)
        for part, dtype in dtypes.items():
            base._parameters[part].data = base._parameters[part].to(dtype)
    copies = trained_copies(model)
    for name, module in saved_modules(model):
        own = {part: copies[f"{name}.{part}"] for part in module.original_module.state_dict()}
        module.original_module.load_state_dict(own)


def _refuse_tied(model: nn.Module) -> None:
    """A weight that modules share and that was changed for one of them, or for each apart."""
    sharing: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for part, parameter in module._parameters.items():
            if parameter is not None:
                sharing.setdefault(id(parameter), []).append((f"{path}.{part}", module))
    trained: dict[nn.Module, nn.Module] = {}
    for _, saved in saved_modules(model):
        copied = saved.modules_to_save[ADAPTER_NAME]
        for path, module in saved.original_module.named_modules():
            trained[module] = copied.get_submodule(path)
    adapted = {layer.get_base_layer() for _, layer in adapter_layers(model)}
    for owners in sharing.values():
        part = owners[0][0].rpartition(".")[2]
        ends = {id(getattr(trained.get(module, module), part)) for _, module in owners}
        changed = [name for name, module in owners if module in adapted or module in trained]
        if len(owners) > 1 and (len(ends) > 1 or any(m in adapted for _, m in owners)):
            name = _plain_name(changed[0])
            raise tied_weight(name, next(n for n in map(_plain_name, dict(owners)) if n != name))


def _plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def tied_weight(name: str, other: str) -> ValueError:
    """Why a weight that was adapted cannot be folded."""
    return ValueError(
        f"{name} was adapted apart from {other}, which it is tied to: folding would change both; "
        "keep the adapter, or train one that leaves tied weights alone"
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def fold_layer(name: str, layer: Any) -> None:
    """Add what one layer's adapters learned to its dense weights, in the weights' dtype."""
    try:
        layer.merge(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"{name}: {type(layer).__name__} cannot be folded into the weights ({error}); keep "
            "the checkpoint, whose adapters peft.PeftModel.from_pretrained loads"
        ) from error


def trained_copies(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the modules that PEFT trained whole (`modules_to_save`), by the model's names."""
    return {
        f"{name}.{part}": tensor
        for name, module in saved_modules(model)
        for part, tensor in module.modules_to_save[ADAPTER_NAME].state_dict().items()
    }
