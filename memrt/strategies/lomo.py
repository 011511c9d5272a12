"""LOMO: stochastic gradient descent in backward; no optimizer state, one gradient at a time.

W <- W (1 - lr weight_decay) - lr G as soon as G exists; G is then freed. Optimizer state: 0 bytes;
gradients: the largest single one, 4 n_max bytes (2 in bf16) in place of 4 n. It wants the learning
rate of SGD (the paper: 3e-2 to 5e-2, linear schedule, batch 16) and clipping: by the global norm
(the paper: max_grad_norm=1.0) with `clip="two_pass"`, at the price of a second backward pass, or
element by element in the one pass (`clip_value`; the authors' advice for rates below 1e-3). One
pass never has the sum of several micro-batches, and refuses them; two passes keep it. bf16 weights
are rounded stochastically: to the nearest, most updates would be lost. What is kept and what is
refused: docs/update-time.md. Lv et al. 2023, arXiv 2306.09782.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from memrt.optimizers.lomo import Lomo as LomoOptimizer
from memrt.registry import register
from memrt.update_time import RuleInBackward
from memrt.values import is_number

if TYPE_CHECKING:
    import torch

__all__ = ["Lomo"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Lomo(RuleInBackward):
    """Settings; the learning rate is the run's.

    clip: "none" or "two_pass", as for `in_backward`.
    embeddings: as for `in_backward`; what waits for the step has this rule all the same.
    clip_value: the largest magnitude of an element of a gradient; None: no bound.
    """

    name: ClassVar[str] = "lomo"

    clip_value: float | None = None

    def __post_init__(self) -> None:
        RuleInBackward.__post_init__(self)
        if self.clip_value is not None and not (is_number(self.clip_value) and self.clip_value > 0):
            raise ValueError(f"clip_value={self.clip_value!r}: must be a number above 0, or None")

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """Descent without state."""
        return LomoOptimizer

    def options(self) -> dict[str, Any]:
        """The bound of an element."""
        return {"clip_value": self.clip_value}
