"""APOLLO-Mini: the gradient with SGD's memory, scaled as a whole from a sketch of rank 1.

`apollo` (see there) with rank 1, one factor for the whole weight and scale 128: for W with sides
m <= n the sketch R has n elements, and W ← W (1 - lr·wd) - lr·sqrt(128)·limit(dW·‖N‖ / ‖R‖).

Bytes per weight: moments 8 n in place of 8 m n, and 4 for a norm; the gradient stays, 4 m n (2 in
bf16), with `in_backward` one weight's at a time. Costs a sketch of one vector, 2 m n operations a
weight and step. Zhu et al. 2024, arXiv 2412.05270.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memrt.registry import register
from memrt.strategies.apollo import Apollo

__all__ = ["ApolloMini"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class ApolloMini(Apollo):
    """Settings: those of `apollo`, with the paper's values for Mini (192 was best at 130 M)."""

    name: ClassVar[str] = "apollo_mini"

    rank: int = 1
    scale: float = 128.0
    granularity: str = "tensor"
