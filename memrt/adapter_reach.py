"""The layers that adapters reach: where they are, what they leave out, and what goes past them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from typing import Any

from torch import nn

from memrt.structure import is_plain_linear

__all__ = ["adapter_layers", "refuse_passed_by", "warn_of_the_rest"]

logger = logging.getLogger(__name__)


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers of a model that carry adapters, by name."""
    # unless it is there nobody made adapters; importing it makes tensors that a plan would count
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return []
    kind = tuners.BaseTunerLayer
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]


def warn_of_the_rest(model: nn.Module, *, apart: Collection[str]) -> None:
    """PEFT names layers by the ends of their names, and takes some for a mixture's experts.

    `apart`: modules of which it is known: heads.
    """
    adapted = tuple(f"{name}." for name, _ in adapter_layers(model))
    left = [
        name
        for name, module in model.named_modules()
        if is_plain_linear(module)
        and not f"{name}.".startswith(adapted)
        and not any(f"{name}.".startswith(f"{head}.") for head in apart)
    ]
    if left:
        logger.warning(
            "peft: PEFT put no adapters on %d linear layers (such as %s), which stay as they are",
            len(left),
            left[0],
        )
    passed_by = _passed_by(model)
    if passed_by:
        logger.warning(
            "peft: nn.MultiheadAttention multiplies by the weights of %d layers (such as %s) "
            "itself, so that their adapters do nothing",
            len(passed_by),
            passed_by[0],
        )


def refuse_passed_by(model: nn.Module) -> None:
    """Adapters where they do nothing, on layers that were named for it."""
    passed_by = _passed_by(model)
    if passed_by:
        raise ValueError(
            f"nn.MultiheadAttention multiplies by the weight of {passed_by[0]} itself, so that "
            "adapters on that layer would do nothing; name other targets"
        )


def _passed_by(model: nn.Module) -> list[str]:
    """Adapted layers that are never called: torch's attention reads its last layer's weight."""
    return [
        name
        for name, _ in adapter_layers(model)
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]
