"""The optimizer's side of a step on the device: AdamW in every state format, and GaLore.

The cases are those of `benchmarks.optimizer_step` and `benchmarks.galore_step`, by their own code,
on sizes that keep a large card busy. Beside the AdamW steps stands what the card copies in a
second, read and write counted; the bytes that a step on FP8 moments must move, over its time, are a
share of that. Goals: at least 85 % of it; at most half the time of AdamW with fp32 moments: torch's
fused one on fp32 weights, memrt's on bf16 weights, where torch's keeps bf16 moments. No step can be
faster than its bytes: `bound` is their ratio.

GaLore's update of an 8B model (of one layer here, times 32), refreshes included, should take 0.2 s.
A gradient-free layer is refreshed in its backward, so that a refresh is what the first step takes
beside a later one; a throwaway model has run before, and everything is compiled. The form with the
gradient is left out: its exact SVDs take minutes at this width.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.galore_step import benchmark as galore_step
from benchmarks.gpu.common import PartFile, Setting, empty, parse, synchronize
from benchmarks.optimizer_step import benchmark as optimizer_step
from benchmarks.step_times import case_name

__all__ = ["main"]

DTYPES = ("bfloat16", "float32")
ADAMW_SIZES = {"num_parameters": 8, "elements": 2**24, "steps": 12, "warm_up": 3}
GALORE_SIZES = {
    **galore_step.DEFAULTS,
    "cases": [
        {"size": "8B", "layers": 1, "vocabulary": 1024, "tokens": tokens, "rank": rank}
        for tokens in (2048, 8192)
        for rank in (128, 1024)
    ],
    "sequence_length": 2048,
}
NUM_LAYERS_8B = 32
CASE_SECONDS = 120.0

FLOAT32_MOMENTS = "memrt float32"
FLOAT32_STATE_BYTES = 2 * (2 * 4)
FP8_STATE_BYTES = 2 * (2 + 2 * 5 / 128)
"""Read and written a parameter: two codes, and of each group of 128 two fp32 and two uint8."""


def copy_bytes_per_second(setting: Setting) -> float:
    """The best of some copies on the device, read and write counted."""
    num_bytes = 2**20 if setting.tiny else 2**31
    source = torch.ones(num_bytes, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        synchronize(setting.device)
        begun = time.perf_counter()
        target.copy_(source)
        synchronize(setting.device)
        times.append(time.perf_counter() - begun)
    return 2 * num_bytes / min(times[1:])


def _adamw(setting: Setting, dtype: str) -> dict[str, Any]:
    empty(setting.device)
    sizes = {**optimizer_step.DEFAULTS, **(optimizer_step.TINY if setting.tiny else ADAMW_SIZES)}
    found = optimizer_step.measure(sizes, dtype, setting.device)
    seconds = {label: median(times) for label, times in found["step_seconds"].items()}
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    moved = found["num_elements"] * (3 * width + FP8_STATE_BYTES)  # p twice, g once, state
    bandwidth = copy_bytes_per_second(setting)
    ours = seconds[optimizer_step.OURS]
    base = optimizer_step.BASE if dtype == "float32" else FLOAT32_MOMENTS
    return {
        **found,
        "median_seconds": seconds,
        "copy_bytes_per_second": bandwidth,
        "fp8_share_of_copy": moved / ours / bandwidth,
        "fp32_moments": base,
        "fp8_to_fp32_moments": ours / seconds[base],
        "bound": (3 * width + FP8_STATE_BYTES) / (3 * width + FLOAT32_STATE_BYTES),
    }


def _galore(setting: Setting, case: dict[str, Any]) -> dict[str, Any]:
    empty(setting.device)
    sizes = {**galore_step.DEFAULTS, **galore_step.TINY} if setting.tiny else GALORE_SIZES
    dtype = torch.float32 if setting.tiny else torch.bfloat16
    sizes = {**sizes, "left_out": (galore_step.OURS_FORMED,)}
    galore_step.measure({**sizes, "steps": 1, "warm_up": 0}, case, setting.device, dtype)
    empty(setting.device)
    found = galore_step.measure(sizes, case, setting.device, dtype)
    rows = galore_step.summarise(found, sizes["every"])
    update, refresh = _update_and_refresh(found["variants"][galore_step.OURS])
    whole = NUM_LAYERS_8B * (update + refresh / sizes["every"])
    of_8b = {} if setting.tiny else {"update_seconds_of_32_layers": whole}
    times = {"update_seconds": update, "refresh_seconds": refresh, **of_8b}
    return {**found, "variants_amortised": rows, **times}


def _update_and_refresh(times: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of a later step's update, and what the first step took beside a later one."""
    later = times["later_seconds"]
    refresh = float(times["first_seconds"]["whole"]) - median(later["whole"])
    return median(later["update"]), max(0.0, refresh)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill updates.json."""
    setting = parse(argv, __doc__ or "")
    part = PartFile(setting, "updates", case_seconds=CASE_SECONDS)
    for dtype in DTYPES:
        part.case(f"adamw {dtype}", partial(_adamw, setting, dtype))
    cases = galore_step.TINY["cases"] if setting.tiny else GALORE_SIZES["cases"]
    for case in cases:
        part.case(f"galore {case_name(case)}", partial(_galore, setting, case))
    return 0


if __name__ == "__main__":
    sys.exit(main())
