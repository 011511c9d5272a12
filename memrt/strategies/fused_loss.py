"""Head and cross-entropy in chunks of tokens: the logits of the whole batch never exist.

For `chunk_tokens` tokens at a time the head's logits [chunk, vocabulary] are made, turned into loss
and gradient, and dropped. Workspace falls from about 3 × tokens × vocabulary × 4 bytes (logits,
their log-softmax, their gradient) to one chunk of it; a trainable head in low precision adds an
fp32 accumulator of its gradient unless `accumulate="weight"`. Costs no product more: gradients are
formed in the forward, chunk by chunk, and only scaled in the backward. The loss is divided by the
number of labels of the whole batch, never of a chunk. An evaluation without metrics makes no logits
either; metrics and prediction see them as ever. The idea is Liger-Kernel's fused linear
cross-entropy, arXiv 2410.10989; here of ordinary operators, one path on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from memrt.head import check_head, logit_transform
from memrt.kernels.linear_cross_entropy import linear_cross_entropy
from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategies.peft import Peft
from memrt.strategy import Attachment, Claim, Phase, Slot, Strategy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["FusedLoss"]

ACCUMULATE = ("float32", "weight")


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLoss(Strategy):
    """Settings.

    chunk_tokens: tokens whose logits exist at a time.
    accumulate: dtype in which the head's gradient is summed over chunks: "float32" or "weight".
    """

    name: ClassVar[str] = "fused_loss"
    phase: ClassVar[Phase] = Phase.HEAD
    lowers: ClassVar[tuple[Account, ...]] = (Account.WORKSPACE,)

    chunk_tokens: int = 256
    accumulate: str = "float32"

    def __post_init__(self) -> None:
        whole = isinstance(self.chunk_tokens, int) and not isinstance(self.chunk_tokens, bool)
        if not whole or self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens!r}: must be 1 or more")
        if self.accumulate not in ACCUMULATE:
            raise ValueError(f"accumulate={self.accumulate!r}: use one of {', '.join(ACCUMULATE)}")

    def check(self, facts: Facts) -> None:
        """Needs a causal or masked language model whose head is a linear layer."""
        check_head(facts)

    def check_stack(self, others: Sequence[Strategy], facts: Facts) -> None:
        """The head must stay the layer that `check` saw: its weight is read chunk by chunk."""
        head = facts.structure.head
        for other in others if head is not None else ():
            formats = (c for c in other.claims(facts) if c.slot is Slot.WEIGHT_FORMAT)
            if any(f"{head}.weight" in claim.scope for claim in formats):
                raise ValueError(
                    f"{other} packs the head {head!r}, whose weight is read as it is; "
                    "leave its head=True out"
                )
            if isinstance(other, Peft) and other.changes(facts.model, str(head)):
                raise ValueError(
                    f"{other} adapts the head {head!r} or trains a copy of it, and only a plain "
                    "linear layer can be taken over; leave the head out there, or fused_loss here"
                )

    def claims(self, facts: Facts) -> list[Claim]:
        """Head and loss."""
        return [Claim(slot=Slot.HEAD)]

    def attach(self, run: Session) -> Attachment:
        """The session routes training with labels here."""
        return _FusedLoss(self, run)


class _FusedLoss(Attachment):
    settings: FusedLoss

    def __init__(self, settings: FusedLoss, run: Session) -> None:
        super().__init__(settings, run)
        assert run.facts.structure.head is not None
        head = run.model.get_submodule(run.facts.structure.head)
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"the head {run.facts.structure.head!r} is a {type(head).__name__} by now, not a "
                "plain linear layer; leave out what changes it, or fused_loss"
            )
        self._head = head
        self._transform = logit_transform(run.facts)

    def loss(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Cross-entropy of `hidden` [..., hidden] against `labels` [...], in chunks."""
        return linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),  # [tokens, hidden]
            self._head.weight,
            labels.reshape(-1).to(hidden.device),
            bias=self._head.bias,
            num_items=num_items,
            softcap=self._transform.softcap,
            logit_scale=self._transform.scale,
            chunk_tokens=self.settings.chunk_tokens,
            accumulate="float32" if self.settings.accumulate == "float32" else "weight",
        )
