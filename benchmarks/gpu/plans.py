"""Plans of what `memory` and `seventy_b` train; needs no device, so it runs beside other parts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.gpu.common import PartFile, parse
from benchmarks.gpu.workloads import (
    Model,
    memory_models,
    plan_for,
    seventy_b_model,
    seventy_b_stacks,
    stacks,
)

__all__ = ["key_of", "main"]


def key_of(model: Model, stack: str) -> str:
    """The name of a case here and in `memory`."""
    shape = model.shape
    return f"{model.size} {shape.batch_size}x{shape.sequence_length} {stack}"


def _row(model: Model, stack: str) -> dict[str, Any]:
    found = plan_for(model, stack).to_json()
    del found["conditions"], found["top_allocations"], found["owners"]
    return {**found, "size": model.size, "stack": stack}


def main(argv: Sequence[str] | None = None) -> int:
    """Fill plans.json."""
    setting = parse(argv, __doc__ or "")
    part = PartFile(setting, "plans")
    wanted = [
        (model, stack) for model in memory_models(setting) for stack in stacks(setting, model.size)
    ]
    for packed in ("nf4",) if setting.tiny else ("nf4", "int8"):
        known = seventy_b_stacks(setting, packed=packed).values()
        wanted += [(seventy_b_model(setting), stack) for stack in known]
    for model, stack in wanted:
        part.case(key_of(model, stack), partial(_row, model, stack))
    return 0


if __name__ == "__main__":
    sys.exit(main())
