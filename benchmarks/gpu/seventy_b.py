"""Llama 3's 70B shape on one card: the two stacks of docs/70b-on-one-gpu.md, and QLoRA beside them.

Weights are random, drawn on the device one tensor at a time and packed before the next is drawn
(`memrt.load`); 1 x 2,048 tokens a step. The cases, in three processes:

    gradients   of every adapter of every layer over packed weights, against the same weights kept
                dense, with a control (`benchmarks.gpu.adapter_gradients`)
    ladder,     the stack trained some steps, as in `benchmarks.gpu.memory`: plan, ledger, allocator
    adapters    and NVML side by side; and what loading took beside its result
    QLoRA       PEFT over bitsandbytes' 4-bit layers under transformers' Trainer with gradient
                checkpointing, on the same weights (`benchmarks.gpu.qlora`)

`kept_bytes` are weights, gradients and optimizer state, each at its own maximum, by the ledger.
Where bitsandbytes cannot compute NF4 on the device, the reason is in the file, there is no QLoRA to
compare with, and the stacks run on `int8` weights instead, with `fp8_states`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import adapter_gradients, qlora
from benchmarks.gpu.common import PartFile, Setting, parse
from benchmarks.gpu.constants import Driver
from benchmarks.gpu.memory import make_workspaces, measured
from benchmarks.gpu.packing import nf4_problem
from benchmarks.gpu.plans import key_of
from benchmarks.gpu.workloads import seventy_b_model, seventy_b_stacks
from memrt.packed_weights import packed_layers

__all__ = ["QLORA", "main"]

QLORA = "QLoRA"
CASE_SECONDS = 240.0
TIMED_STEPS = 4
KEPT = ("weights", "gradients", "optimizer")


class _Built:
    """What the device held when the model was loaded."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.found: dict[str, Any] = {}

    def __call__(self, model: nn.Module) -> None:
        layers = packed_layers(model)
        per_block: dict[str, int] = {}
        for name, layer in layers:
            block = name.split(".layers.")[-1].split(".")[0]
            dense = layer.dense_shape[0] * layer.dense_shape[1] * layer.dense_dtype.itemsize
            per_block[block] = per_block.get(block, 0) + dense
        self.found = {
            "num_packed_layers": len(layers),
            "dense_block_bytes": max(per_block.values(), default=0),
            "parameter_bytes": sum(p.nbytes for p in model.parameters()),
        }
        if self._setting.is_cuda:
            self.found["loaded_bytes"] = torch.cuda.memory_allocated(self._setting.device)


def _loading(row: dict[str, Any], built: dict[str, Any]) -> dict[str, Any]:
    """The peak of loading beside its result: one block's dense weights at most."""
    allocated = row["allocated"]
    if allocated is None or "loaded_bytes" not in built:
        return built
    beside = (allocated["phases"]["load"] or 0) - built["loaded_bytes"]
    fits = beside <= built["dense_block_bytes"]
    return {**built, "beside_result_bytes": beside, "at_most_one_block": fits}


def _stack(setting: Setting, driver: Driver, stack: str) -> dict[str, Any]:
    model = seventy_b_model(setting)
    built = _Built(setting)
    steps = 1 if setting.tiny else TIMED_STEPS
    row = measured(setting, model, stack, steps=steps, driver=driver, on_built=built)
    return {
        **row,
        "plan_key": key_of(model, stack),
        "kept_bytes": sum(row["account_maxima"][name] for name in KEPT),
        "loading": _loading(row, built.found),
    }


def _qlora(setting: Setting, driver: Driver, problem: str | None) -> dict[str, Any]:
    if problem is not None:
        return {"status": "skipped", "reason": problem}
    return qlora.measured(setting, seventy_b_model(setting), driver=driver)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill seventy_b.json."""
    setting = parse(argv, __doc__ or "")
    driver = Driver(setting)  # before the first tensor: its baseline is without our context
    part = PartFile(setting, "seventy_b", case_seconds=CASE_SECONDS)
    make_workspaces(setting.device)
    problem = nf4_problem(setting.device)
    packed = "nf4" if problem is None else "int8"
    part.add("nf4_problem", problem)
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        check = partial(adapter_gradients.check, setting, packed=packed, dtype=dtype)
        part.case(f"gradients {packed} {kind}", check)
    for label, stack in seventy_b_stacks(setting, packed=packed).items():
        part.case(f"{label} {packed}", partial(_stack, setting, driver, stack))
    part.case(QLORA, partial(_qlora, setting, driver, problem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
