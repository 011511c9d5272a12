"""The stacks that fine-tune an encoder with a classification head, and their learning rates.

Every stack names a group of rates: stacks whose update is the same share one. For each group
`python -m benchmarks.quality.sst2 FOLDER --choose-rates` trains its first stack with every rate of
the group and takes the one with the lowest loss on held-out rows of the training
file, never of the dev file; `sst2_rates.json` holds what came out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["BASELINE", "RATES", "RATES_FILE", "STACKS", "Rates", "Stack", "chosen_rate"]

RATES_FILE = Path(__file__).with_name("sst2_rates.json")
BASELINE = "adamw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Learning rates to choose from, and why these."""

    rates: tuple[float, ...]
    reason: str
    seeds: int = 1
    """Runs a rate, more where one says too little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A stack of strategies and its group of rates."""

    strategies: tuple[str, ...] = ()
    rates: str = "adamw"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """`TrainingArguments` that the stack needs."""
    probes: bool = False
    """Whether it looks at training rows before the first step."""


RATES: dict[str, Rates] = {
    "adamw": Rates(
        rates=(5e-5, 1e-4, 2e-4),
        reason="AdamW's own, also of what keeps its state in other formats or updates earlier",
    ),
    "lisa": Rates(
        rates=(1e-4, 2e-4, 3e-4), reason="a layer trains a third of the time, so it goes further"
    ),
    "badam": Rates(
        rates=(2e-4, 3e-4, 5e-4),
        reason="a block trains a sixth of the time, so it goes further",
        seeds=3,
    ),
    "galore": Rates(rates=(1e-4, 3e-4), reason="only a quarter of every weight's directions moves"),
    "apollo": Rates(rates=(1e-4, 3e-4), reason="AdamW's size of update, along the gradient"),
    "apollo_mini": Rates(rates=(1e-4, 3e-4), reason="AdamW's size of update, along the gradient"),
    "fira": Rates(rates=(1e-4, 3e-4), reason="GaLore's update and the rest of the gradient"),
    "sgd": Rates(
        rates=(0.03, 0.1, 0.3),
        reason="SGD moves by the gradient itself; the paper's 3e-2 to 5e-2 and above, clipped",
    ),
    "adalomo": Rates(
        rates=(1e-3, 3e-3), reason="a rate relative to the size of the weight, as Adafactor's"
    ),
    "lora": Rates(rates=(5e-4, 1e-3, 2e-3, 3e-3), reason="adapters begin at zero and are small"),
    "ladder": Rates(
        rates=(3e-4, 5e-4, 1e-3, 2e-3),
        reason="a new network beside the model, which begins at nothing",
    ),
    "low_rank_ladder": Rates(
        rates=(5e-4, 1e-3, 2e-3),
        reason="its taps begin at random, and so have further to go than linear ones",
        seeds=2,
    ),
}

_FREE = {"max_grad_norm": 0.0}  # one pass has no norm to clip by
_HEAD = "options={'modules_to_save': ['classifier']}"
_LORA = f"peft(rank=16, {_HEAD})"
_GALORE = "galore(rank=96, every=20, scale=1.0)"
_BADAM = "badam(every=14, order='descending', head='always')"  # the head is new
_LISA = "lisa(layers=2, every=10)"
_LADDER = "ladder(reduction=3, init='principal')"  # on held-out rows better than 4
_POOLED = "reduction=2, taps='pooled', init='principal'"  # better there than random ones

STACKS: dict[str, Stack] = {
    BASELINE: Stack(),
    "activation_checkpoint": Stack(strategies=("activation_checkpoint",)),
    "offload_activations": Stack(strategies=("offload_activations",)),
    "in_backward": Stack(strategies=("in_backward",), arguments=_FREE),
    "int8_states": Stack(strategies=("int8_states",)),
    "fp8_states": Stack(strategies=("fp8_states",)),
    "int4_states": Stack(strategies=("int4_states",)),
    "lisa": Stack(strategies=(_LISA,), rates="lisa"),
    "badam": Stack(strategies=(_BADAM,), rates="badam"),
    "galore": Stack(strategies=(_GALORE,), rates="galore"),
    "galore, gradient formed": Stack(
        strategies=("galore(form='plain', rank=96, every=20, scale=1.0)",), rates="galore"
    ),
    "q_galore": Stack(strategies=("q_galore(rank=96, every=20, scale=1.0)",), rates="galore"),
    "apollo": Stack(strategies=("apollo(rank=96, every=20, scale=4.0)",), rates="apollo"),
    "apollo_mini": Stack(strategies=("apollo_mini(every=20)",), rates="apollo_mini"),
    "fira": Stack(strategies=("fira(rank=96, every=20, scale=1.0)",), rates="fira"),
    "lomo": Stack(strategies=("lomo(clip='two_pass')",), rates="sgd"),
    "adalomo": Stack(strategies=("adalomo",), rates="adalomo", arguments=_FREE),
    "lora": Stack(strategies=(_LORA,), rates="lora"),
    "lora + activation_checkpoint": Stack(
        strategies=(_LORA, "activation_checkpoint"), rates="lora"
    ),
    "lora + fused_lora": Stack(strategies=(_LORA, "fused_lora"), rates="lora"),
    "nf4 + lora": Stack(strategies=("nf4", _LORA), rates="lora"),
    "int8 + lora": Stack(strategies=("int8", _LORA), rates="lora"),
    "ladder": Stack(strategies=(_LADDER,), rates="ladder", probes=True),
    "ladder, taps kept in FP8": Stack(
        strategies=("ladder(reduction=3, init='principal', kept='float8')",),
        rates="ladder",
        probes=True,
    ),
    "ladder, low-rank taps": Stack(
        strategies=("ladder(reduction=4, init='principal', taps='low_rank')",),
        rates="low_rank_ladder",
        probes=True,
    ),
    "ladder, projected taps": Stack(
        strategies=("ladder(reduction=2, init='principal', taps='projected')",),
        rates="ladder",
        probes=True,
    ),
    "ladder, pooled taps": Stack(strategies=(f"ladder({_POOLED})",), rates="ladder", probes=True),
    "ladder, pooled taps, checkpointed": Stack(
        strategies=(f"ladder({_POOLED}, checkpoint=True)",), rates="ladder", probes=True
    ),
    "activation_checkpoint + offload_activations": Stack(
        strategies=("activation_checkpoint", "offload_activations")
    ),
    "galore + fp8_states": Stack(strategies=(_GALORE, "fp8_states"), rates="galore"),
    "lisa + int8_states": Stack(strategies=(_LISA, "int8_states"), rates="lisa"),
    "nf4 + lora + activation_checkpoint": Stack(
        strategies=("nf4", _LORA, "activation_checkpoint"), rates="lora"
    ),
    "nf4 + ladder": Stack(strategies=("nf4", _LADDER), rates="ladder", probes=True),
}
"""The one that nothing trains without comes first. Ranks are a quarter of the model's width, and
intervals are cut to runs of a hundred steps. Adapters' heads train with them (`modules_to_save`):
a head that begins at random numbers and stays there says nothing about an adapter. Taps that learn
nothing let only some directions through, so their ladders are wider: on held-out rows half the
model's width does better than a third."""


def chosen_rate(stack: Stack) -> float:
    """The learning rate that held-out rows chose for the stack's group."""
    found = json.loads(RATES_FILE.read_text("utf-8"))["groups"]
    if stack.rates not in found:
        raise ValueError(
            f"{RATES_FILE.name} has no rate for {stack.rates!r}; run with --choose-rates"
        )
    rate: float = found[stack.rates]["chosen"]
    return rate
