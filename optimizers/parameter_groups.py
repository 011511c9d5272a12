"""What a parameter group must be before an optimizer takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memrt.optimizers.state_formats import STATE_FORMATS

__all__ = ["check_group", "check_storages"]

# settings of torch.optim.AdamW that would have no effect here
_FOREIGN_SETTINGS = ("amsgrad", "capturable", "differentiable", "maximize")


def check_group(group: dict[str, Any]) -> None:
    """Refuse a parameter group that cannot be stepped as it says."""
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if not _is_number(value) or not value >= 0:
            raise ValueError(f"{name}={value!r} is not a number of at least 0; give a float")
    betas = group["betas"] if isinstance(group["betas"], (tuple, list)) else ()
    if len(betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={group['betas']!r} must be two numbers in [0, 1)")
    if group["state_format"] not in STATE_FORMATS:
        raise ValueError(
            f"state_format={group['state_format']!r} is not known; use one of {list(STATE_FORMATS)}"
        )
    for name, kind in (("stochastic_rounding", bool), ("rounding_seed", int)):
        if type(group[name]) is not kind:
            raise ValueError(f"{name}={group[name]!r} is not a {kind.__name__}; give one")
    for name in _FOREIGN_SETTINGS:
        if group.get(name):
            raise ValueError(f"{name}={group[name]!r} has no effect in this AdamW; remove it")
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; this AdamW "
                "updates fp32, bf16 and fp16 (in fp32)"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_storages(groups: Sequence[dict[str, Any]]) -> None:
    """One update a storage: refuse groups that hold the same values twice."""
    seen: dict[tuple[int, int, int], torch.UntypedStorage] = {}
    for parameter in (parameter for group in groups for parameter in group["params"]):
        if not parameter.numel():
            continue
        storage = parameter.untyped_storage()
        key = (id(storage), parameter.storage_offset(), parameter.numel())
        if key in seen:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is given twice, or shares its "
                "storage with another (tied weights); give every storage once"
            )
        seen[key] = storage
