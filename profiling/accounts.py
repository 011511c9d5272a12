"""The five accounts of a training run's memory and the places where bytes can lie."""

from __future__ import annotations

from enum import Enum

__all__ = ["Account", "Place"]


class Account(str, Enum):
    """What a byte is for. Every storage belongs to exactly one account at any instant."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    WORKSPACE = "workspace"  # logits and other temporaries


class Place(str, Enum):
    """Where a byte lies. On a CPU run `host` and `disk` are marks on storages that were moved."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
