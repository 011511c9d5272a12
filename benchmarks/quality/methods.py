"""The methods whose quality is compared, each as a stack of strategies with its learning rates."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BASELINE", "METHODS", "Method"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A stack, and the three learning rates that a short proxy chooses from."""

    strategies: tuple[str, ...]
    learning_rates: tuple[float, float, float]
    overrides: tuple[str, ...] = ()
    """Settings of `memrt train` that the method needs."""


_DENSE = (1e-4, 3e-4, 1e-3)
_LOW_RANK = (3e-4, 1e-3, 3e-3)

BASELINE = "adamw"

METHODS = {
    BASELINE: Method(strategies=(), learning_rates=_DENSE),
    "int8_states": Method(strategies=("int8_states",), learning_rates=_DENSE),
    "fp8_states": Method(strategies=("fp8_states",), learning_rates=_DENSE),
    "int4_states": Method(strategies=("int4_states",), learning_rates=_DENSE),
    "lisa": Method(strategies=("lisa(every=10)",), learning_rates=_DENSE),
    "badam": Method(strategies=("badam(every=10)",), learning_rates=_DENSE),
    "galore": Method(strategies=("galore(rank=64, every=50)",), learning_rates=_LOW_RANK),
    "galore, gradient formed": Method(
        strategies=("galore(form='plain', rank=64, every=50)",), learning_rates=_LOW_RANK
    ),
    "galore + int8_states": Method(
        strategies=("galore(rank=64, every=50)", "int8_states"), learning_rates=_LOW_RANK
    ),
    "q_galore": Method(strategies=("q_galore(rank=64, every=50)",), learning_rates=_LOW_RANK),
    "fira": Method(strategies=("fira(rank=64, every=50)",), learning_rates=_LOW_RANK),
    "apollo": Method(strategies=("apollo(rank=64)",), learning_rates=_LOW_RANK),
    "apollo_mini": Method(strategies=("apollo_mini",), learning_rates=_LOW_RANK),
    "adalomo": Method(
        strategies=("adalomo",),
        learning_rates=(1e-4, 5e-4, 2e-3),
        overrides=("training.max_grad_norm=0",),  # it bounds every update itself
    ),
    "lora": Method(strategies=("peft(rank=16)",), learning_rates=_LOW_RANK),
    "lora + activation_checkpoint": Method(
        strategies=("peft(rank=16)", "activation_checkpoint"), learning_rates=_LOW_RANK
    ),
    "qlora": Method(strategies=("nf4", "peft(rank=16)"), learning_rates=_LOW_RANK),
    "ladder": Method(strategies=("ladder(reduction=4)",), learning_rates=_LOW_RANK),
    "ladder, low-rank taps": Method(
        strategies=("ladder(reduction=4, taps='low_rank')",), learning_rates=_LOW_RANK
    ),
    "ladder, pooled taps": Method(
        strategies=("ladder(reduction=4, taps='pooled')",), learning_rates=_LOW_RANK
    ),
    "ladder, pooled taps, checkpointed": Method(
        strategies=("ladder(reduction=4, taps='pooled', checkpoint=True)",),
        learning_rates=_LOW_RANK,
    ),
    "ladder, selected taps": Method(
        strategies=("ladder(reduction=4, taps='selected')",), learning_rates=_LOW_RANK
    ),
    "qst": Method(strategies=("nf4", "ladder(reduction=4)"), learning_rates=_LOW_RANK),
}
"""Ladders are a fourth of the model's width, for a sixteenth would be 20 channels. Ranks are a
fifth of it, as 128 is of the papers' small models; intervals are cut to runs of a few hundred
steps, so that a run has as many of them as a long one."""
