"""The methods whose quality is compared, each as a stack of strategies with its learning rates."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BASELINE", "METHODS", "Method"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A stack, and the three learning rates that a short proxy chooses from."""

    strategies: tuple[str, ...]
    learning_rates: tuple[float, float, float] = (3e-4, 1e-3, 3e-3)
    rate_of: str | None = None
    """The method whose proxies choose: its update is the same, up to the rounding of what is kept
    or packed."""
    overrides: tuple[str, ...] = ()
    """Settings of `memrt train` that the method needs."""


_LOW_RANK = (1e-3, 3e-3, 1e-2)  # the papers' is 1e-2, for an update that is scaled down

BASELINE = "adamw"
_WHOLE = "{'modules_to_save': ['embed_tokens', 'lm_head']}"  # trained as they are
_LADDER = "ladder(reduction=4, init='principal'"

METHODS = {
    BASELINE: Method(strategies=()),
    "int8_states": Method(strategies=("int8_states",), rate_of=BASELINE),
    "fp8_states": Method(strategies=("fp8_states",), rate_of=BASELINE),
    "int4_states": Method(strategies=("int4_states",), rate_of=BASELINE),
    "lisa": Method(strategies=("lisa(every=10)",)),
    "badam": Method(strategies=("badam(every=10)",)),
    "badam, embeddings and head too": Method(
        strategies=("badam(every=10, embeddings=True, head=True)",), rate_of="badam"
    ),
    "galore": Method(strategies=("galore(rank=64, every=50)",), learning_rates=_LOW_RANK),
    "galore, gradient formed": Method(
        strategies=("galore(form='plain', rank=64, every=50)",), rate_of="galore"
    ),
    "galore, moments rotated": Method(
        strategies=("galore(rank=64, every=50, moments='rotated')",), rate_of="galore"
    ),
    "galore + int8_states": Method(
        strategies=("galore(rank=64, every=50)", "int8_states"), rate_of="galore"
    ),
    "q_galore": Method(strategies=("q_galore(rank=64, every=50)",), learning_rates=_LOW_RANK),
    "fira": Method(strategies=("fira(rank=64, every=50)",), learning_rates=_LOW_RANK),
    "apollo": Method(strategies=("apollo(rank=64)",), learning_rates=_LOW_RANK),
    "apollo_mini": Method(strategies=("apollo_mini",), learning_rates=_LOW_RANK),
    "lomo": Method(
        strategies=("lomo(clip='two_pass')",), learning_rates=(0.1, 0.3, 1.0)
    ),  # a gradient of norm 1 at most
    "adalomo": Method(
        strategies=("adalomo",),
        learning_rates=(5e-4, 2e-3, 8e-3),
        overrides=("training.max_grad_norm=0",),  # it bounds every update itself
    ),
    "lora": Method(strategies=("peft(rank=16)",)),
    "lora, embeddings and head too": Method(
        strategies=(f"peft(rank=16, options={_WHOLE})",), rate_of="lora"
    ),
    "lora + activation_checkpoint": Method(
        strategies=("peft(rank=16)", "activation_checkpoint"), rate_of="lora"
    ),
    "qlora": Method(strategies=("nf4", "peft(rank=16)"), rate_of="lora"),
    "ladder": Method(strategies=(_LADDER + ")",)),
    "ladder, random start": Method(strategies=("ladder(reduction=4, init='random')",)),
    "ladder, taps kept in FP8": Method(
        strategies=(_LADDER + ", kept='float8')",), rate_of="ladder"
    ),
    "ladder, low-rank taps": Method(strategies=(_LADDER + ", taps='low_rank')",)),
    "ladder, low-rank taps, rate of ladder": Method(
        strategies=(_LADDER + ", taps='low_rank')",), rate_of="ladder"
    ),
    "ladder, projected taps": Method(strategies=(_LADDER + ", taps='projected')",)),
    "ladder, pooled taps": Method(strategies=("ladder(reduction=4, taps='pooled')",)),
    "ladder, pooled taps, checkpointed": Method(
        strategies=("ladder(reduction=4, taps='pooled', checkpoint=True)",),
        rate_of="ladder, pooled taps",
    ),
    "qst": Method(strategies=("nf4", _LADDER + ")"), rate_of="ladder"),
}
"""Ladders are a fourth of the model's width, for a sixteenth would be 20 channels. Ranks are a
fifth of it, as 128 is of the papers' small models; intervals are cut to runs of a few hundred
steps, so that a run has as many of them as a long one."""
