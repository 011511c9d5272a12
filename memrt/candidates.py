"""What `memrt.choose` may add to a stack: from the least change of training to the largest.

A rung says how the run differs from ordinary fine-tuning; within a rung, six ways of keeping
activations, which leave the numbers as they are but for rounding. So a candidate is a rung's
strategies and one of those ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from memrt.strategy import Strategy

__all__ = ["ACTIVATIONS", "WHY", "Rung", "bring_parameters", "rungs", "why"]

ACTIVATIONS: tuple[tuple[str, ...], ...] = (
    (),
    ("fused_loss",),
    ("fused_loss", "offload_activations"),
    ("activation_checkpoint",),
    ("activation_checkpoint", "fused_loss"),
    ("activation_checkpoint", "fused_loss", "offload_activations"),
)
"""Ways of keeping activations. The last takes the least memory, or the third, where a whole layer
that is computed again is more than what comes back from the host for it."""

WHY: dict[str, str] = {
    "activation_checkpoint": "the same numbers; layers are computed again in backward",
    "badam": "AdamW on one layer at a time; embeddings and head rest",
    "fused_loss": "the same numbers but for rounding; head and loss run in chunks of tokens, so "
    "that the logits never exist at once",
    "galore": "all weights train, each update in a subspace of low rank; no gradient of a weight "
    "is formed",
    "in_backward": "the same update; each gradient is applied and dropped in backward",
    "int4_states": "keeps full fine-tuning; optimizer state in 4 bits",
    "int8_states": "keeps full fine-tuning; optimizer state in 8 bits instead of fp32 or bf16",
    "ladder": "changes what is trained: a side network, without backward through the model",
    "lisa": "keeps AdamW; embeddings, head and a few layers in turn train, the others rest",
    "nf4": "the frozen weights are rounded to 4 bits, once",
    "offload_activations": "the same numbers; what backward needs waits on the host",
    "peft": "changes what is trained: LoRA adapters on frozen weights",
}
"""What a strategy does to a run, in one sentence."""


def why(name: str, strategies: Sequence[Strategy]) -> str:
    """The sentence; where one of these brings what trains, nothing is fine-tuned as a whole."""
    sentence = WHY[name]
    if bring_parameters(strategies):
        return sentence.removeprefix("keeps full fine-tuning; ")
    return sentence


def bring_parameters(strategies: Sequence[Strategy]) -> bool:
    """Whether what trains comes from one of them."""
    return any(strategy.brings_parameters for strategy in strategies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """Strategies that go beyond the ways of keeping activations, and what they change."""

    title: str
    adds: tuple[str, ...]
    trains_all: bool
    """Whether all weights train with AdamW, so that `full_parameters=True` admits it."""
    holds: Literal["gradients", "weights", "packed"]
    """What is on the device at least: weights and all gradients, weights, or packed weights."""


def rungs(*, hidden_size: int, max_grad_norm: float, accumulation_steps: int) -> list[Rung]:
    """Every rung for a model of this width, from the least change of training to the largest."""
    at_once = "in_backward(clip='two_pass')" if max_grad_norm > 0 else "in_backward"
    rank = max(4, hidden_size // 16)
    state = "int8_states"
    found = [
        Rung(title="full fine-tuning", adds=(), trains_all=True, holds="gradients"),
        Rung(
            title="full fine-tuning, 8-bit optimizer state",
            adds=(state,),
            trains_all=True,
            holds="gradients",
        ),
        Rung(
            title="full fine-tuning, 4-bit optimizer state",
            adds=("int4_states",),
            trains_all=True,
            holds="gradients",
        ),
        Rung(
            title="full fine-tuning, updates in backward",
            adds=(state, at_once),
            trains_all=True,
            holds="weights",
        ),
        Rung(
            title="a few layers at a time", adds=(state, "lisa"), trains_all=True, holds="weights"
        ),
        Rung(
            title="low-rank updates",
            adds=(state, f"galore(rank={rank})"),
            trains_all=False,
            holds="weights",
        ),
        Rung(title="one layer at a time", adds=(state, "badam"), trains_all=False, holds="weights"),
        Rung(title="adapters on frozen weights", adds=("peft",), trains_all=False, holds="weights"),
        Rung(
            title="adapters on weights in 4 bits",
            adds=("nf4", "peft"),
            trains_all=False,
            holds="packed",
        ),
        Rung(
            title="a side network on weights in 4 bits",
            adds=("nf4", "ladder"),
            trains_all=False,
            holds="packed",
        ),
    ]
    # of several micro-batches every gradient lives until the last
    return [rung for rung in found if accumulation_steps == 1 or at_once not in rung.adds]
