"""In-backward updates: each parameter is updated in backward, and its gradient is freed at once.

The update is the run's own (AdamW in any state format), one parameter at a time, with the bits of a
step after backward. With parameters of n_1, n_2, ... elements the gradients account falls from 4
(n_1 + n_2 + ...) bytes to about 4 max(n_i) (2 in bf16), if a step is one micro-batch; with more of
them nothing is saved. Costs no operation more, unless the norm is clipped: `max_grad_norm` needs
`clip="two_pass"`, a second backward pass, exact. Weights that are projected (`galore`) are updated
at the step, all others in backward. What is kept and what is refused: docs/update-time.md. Lv et
al. 2023, arXiv 2306.09782 (LOMO; its rule: SGD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memrt.registry import register
from memrt.update_time import UpdateInBackward

__all__ = ["InBackward"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class InBackward(UpdateInBackward):
    """Settings.

    clip: "none" (one pass; `max_grad_norm` is refused; a gradient that is not finite ends the run)
        or "two_pass" (exact clipping; such a step is skipped as a whole and counted).
    embeddings: whether everything outside the layers (embeddings, final norm, head) is updated in
        backward too; False: at the step, and its gradients stay until then.
    """

    name: ClassVar[str] = "in_backward"
