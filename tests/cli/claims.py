"""What the strategies of the default table claim to save, from the sizes of a Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Llama", "claims", "saved"]

FLOAT = 4  # bytes of an fp32 element
MOMENTS = 8  # AdamW's two, in fp32
INT8_MOMENTS = 2 * (1 + 4 / 256)  # codes, and a scale for each block of 256
INT8_SMALLEST = 4096  # smaller parameters keep fp32 moments
INT8_SCRATCH = 20  # bytes an element inside bitsandbytes' CPU step, for at most so many elements:
INT8_PIECE = 2**18
LAYER_INPUTS = 19  # bytes kept for backward by a SwiGLU layer, in layer inputs: 19 to 23


@dataclass(frozen=True)
class Llama:
    """The sizes that formulas need; as many key-value heads as heads, head untied."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    tokens: int

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(smaller, larger) side of the linear weights of a layer."""
        return [(self.hidden, self.hidden)] * 4 + [(self.hidden, self.intermediate)] * 3

    @property
    def linear_elements(self) -> int:
        return sum(small * large for small, large in self.linear)

    @property
    def layer_elements(self) -> int:
        return self.linear_elements + 2 * self.hidden

    @property
    def outside_elements(self) -> int:
        """Embedding and head; the final norm is below the noise."""
        return 2 * self.vocabulary * self.hidden


def claims(stack: str, model: Llama, *, rank: int, chunk: int, active: int) -> dict[str, float]:
    """Account -> bytes that the stack's formulas take off it, against `none`."""
    names = {part.split("(")[0] for part in stack.split("+")}
    found: dict[str, float] = {}
    logits = model.vocabulary * FLOAT  # bytes a token
    if "activation_checkpoint" in names:
        # every layer but the one that is recomputed keeps its input instead of its activations
        kept = (model.layers - 1) * LAYER_INPUTS - model.layers
        found["activations"] = kept * model.tokens * model.hidden * FLOAT
    if "fused_loss" in names:
        # gone: logits and their gradient (workspace) and their log-softmax (saved for backward);
        # there: these three for a chunk, and the head's gradient [vocabulary, hidden] in forward
        left = (3 * chunk + model.hidden) * logits
        if "int8_states" in names:
            largest = min(model.vocabulary * model.hidden, INT8_PIECE)
            left = max(left, largest * INT8_SCRATCH)
        found["workspace"] = 2 * model.tokens * logits - left
        log_softmax = (model.tokens - model.hidden) * logits
        found["activations"] = found.get("activations", 0) + log_softmax
    if {"activation_checkpoint", "galore", "fused_loss"} <= names:
        # what a projected layer computes again is booked as workspace: one sum for both
        found["activations + workspace"] = found.pop("activations") + found.pop("workspace")
    frozen = (model.layers - active) * model.layer_elements if "lisa" in names else 0
    if frozen:
        found["gradients"] = frozen * FLOAT
        found["optimizer"] = frozen * MOMENTS
    state = float(MOMENTS)
    if "int8_states" in names:
        state = INT8_MOMENTS
        trained = model.layers * model.linear_elements + model.outside_elements
        trained -= frozen // model.layer_elements * model.linear_elements
        found["optimizer"] = found.get("optimizer", 0) + trained * (MOMENTS - INT8_MOMENTS)
    if "galore" in names:
        dense = model.layers * model.linear_elements
        low = model.layers * sum(large * rank for _, large in model.linear)
        basis = model.layers * sum(small * rank for small, _ in model.linear)
        found["gradients"] = (dense - low) * FLOAT
        outside = model.outside_elements * (MOMENTS - state)
        found["optimizer"] = dense * MOMENTS - low * state - basis * FLOAT + outside
    return found


def saved(run: dict[str, Any], none: dict[str, Any], accounts: str) -> int:
    """Bytes by which the table shows an account (or a sum of two) lower than without strategies."""
    before, after = none["account_maxima"], run["account_maxima"]
    return sum(before[name] - after[name] for name in accounts.split(" + "))
