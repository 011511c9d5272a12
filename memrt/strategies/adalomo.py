"""AdaLomo: LOMO with an adaptive rate, from row and column means of the squared gradient.

Each parameter is updated in backward by Adafactor's rule without momentum, normalised over the
parameter (`memrt.optimizers.adalomo` has the formula). For W [rows, columns] the state is 4 (rows +
columns) bytes in place of AdamW's 8 rows columns, and each of a stack of experts is such a W;
gradients: the largest single one. It costs three sweeps over a gradient in place of one. It needs
no clipping by the global norm, which would take a second backward pass (`clip="two_pass"`). One
pass never has the sum of several micro-batches, and refuses them; two passes keep it. The authors'
learning rates: 1e-3 (their class), 5e-4 (instruction tuning). bf16 weights are rounded
stochastically: to the nearest, most updates would be lost. What is kept and what is refused:
docs/update-time.md. Lv et al. 2023, arXiv 2310.10195.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from memrt.optimizers.adalomo import AdaLomo as AdaLomoOptimizer
from memrt.registry import register
from memrt.update_time import RuleInBackward
from memrt.values import is_number

if TYPE_CHECKING:
    import torch

__all__ = ["AdaLomo"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLomo(RuleInBackward):
    """Settings (the authors' defaults); the learning rate is the run's.

    clip: "none" or "two_pass", as for `in_backward`.
    embeddings: as for `in_backward`; what waits for the step has this rule all the same.
    clip_threshold: the largest root mean square of a parameter's update, before the rate.
    decay_rate: step t weighs t ** decay_rate in the second moment; between -1 and 0.
    """

    name: ClassVar[str] = "adalomo"

    clip_threshold: float = 1.0
    decay_rate: float = -0.8

    def __post_init__(self) -> None:
        RuleInBackward.__post_init__(self)
        if not is_number(self.clip_threshold) or not self.clip_threshold > 0:
            raise ValueError(f"clip_threshold={self.clip_threshold!r}: must be a number above 0")
        if not is_number(self.decay_rate) or not -1 <= self.decay_rate < 0:
            raise ValueError(f"decay_rate={self.decay_rate!r}: must lie in [-1, 0)")

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """The factored second moment."""
        return AdaLomoOptimizer

    def options(self) -> dict[str, Any]:
        """Beside the rate and the decay."""
        return {"clip_threshold": self.clip_threshold, "decay_rate": self.decay_rate}
