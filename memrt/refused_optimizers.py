"""transformers' `optim` names that are refused, because a run with them could not be resumed.

Theirs is another package's optimizer, whose state holds objects: a checkpoint with them cannot be
read with `weights_only=True`, and the layer-wise form saves an optimizer without any state.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["REFUSED_OPTIMIZERS", "require_served"]

_PROJECTORS = (
    "galore-torch's Adafactor keeps objects in its state, which no checkpoint brings back; use "
    "optim='{}' (AdamW in the same subspaces) or 'adalomo' (Adafactor's rule, in backward)"
)

REFUSED_OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {
        name: _PROJECTORS.format(name.replace("adafactor", "adamw"))
        for name in ("galore_adafactor", "galore_adafactor_layerwise")
    }
)
"""Name -> why, and what to do."""


def require_served(optim: Any) -> None:
    """Refuse an `optim` of `REFUSED_OPTIMIZERS`."""
    name = str(getattr(optim, "value", optim))
    if name in REFUSED_OPTIMIZERS:
        raise ValueError(f"optim={name!r}: {REFUSED_OPTIMIZERS[name]}")
