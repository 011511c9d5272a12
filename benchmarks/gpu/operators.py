"""memrt's operators on the device against fp64: no worse than plain PyTorch in the same dtype.

For each operator and dtype the same random inputs go through three computations: the operator on
the device, plain PyTorch on the device in the same dtype, and plain PyTorch on the CPU in fp64 (the
truth). The error of a result is ‖result - truth‖ / ‖truth‖; the operator's must be at most twice
plain PyTorch's, plus the dtype's own rounding. For GaLore's subspace the truth is the exact product
with its basis, and the energy that the best subspace of that rank captures. Packed layers, rungs
and the MLP's product are in `benchmarks.gpu.operator_layers`, the optimizer's side in
`benchmarks.gpu.operator_steps`. The last case is torch's own record of the allocator.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu import operator_layers, operator_steps
from benchmarks.gpu.common import PartFile, Setting, parse
from benchmarks.gpu.comparison import (
    Loss,
    Named,
    codes_row,
    compare,
    error,
    leaves_of,
    rounded,
    three,
    with_gradients,
)
from memrt.kernels.counter_hash import key_words
from memrt.kernels.gaussian_matrix import gaussian_matrix
from memrt.kernels.gradient_products import (
    gradient_squared_norm,
    gradient_times,
    gradient_times_reference,
)
from memrt.kernels.linear_cross_entropy import linear_cross_entropy
from memrt.kernels.lora import lora, lora_reference
from memrt.kernels.projected_linear import projected_linear
from memrt.kernels.projected_update import projected_update_, projected_update_reference
from memrt.optimizers.subspace import Subspace
from memrt.profiling.snapshot import SNAPSHOT_NAME, AllocatorHistory

__all__ = ["main"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _linear_cross_entropy(
    setting: Setting, dtype: torch.dtype, *, accumulate: str, softcap: float | None
) -> dict[str, Any]:
    tokens, hidden, vocabulary = (67, 40, 301) if setting.tiny else (1000, 512, 5003)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::5] = -100
    inputs = rounded(
        {
            "hidden": torch.randn(tokens, hidden, generator=generator),
            "weight": torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5,
        },
        dtype,
    )

    def plain(leaves: Named) -> dict[str, Tensor]:
        logits = leaves["hidden"] @ leaves["weight"].t()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if softcap is not None:
            wide = softcap * torch.tanh(wide / softcap)
        return {"loss": functional.cross_entropy(wide, labels.to(wide.device))}

    def ours(leaves: Named) -> dict[str, Tensor]:
        loss = linear_cross_entropy(
            leaves["hidden"],
            leaves["weight"],
            labels.to(setting.device),
            softcap=softcap,
            chunk_tokens=tokens // 3,
            accumulate="float32" if accumulate == "float32" else "weight",
        )
        return {"loss": loss}

    return three(setting, dtype, inputs, ours, plain)


class _Kept:
    """A gradient sink that keeps the two factors."""

    def accumulate(self, rows: Tensor, columns: Tensor) -> None:
        self.product = rows.t() @ columns


def _projected_linear(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """The layer, with a sink that forms the product which the strategy never forms."""
    tokens, width, height = (67, 40, 24) if setting.tiny else (1000, 512, 768)
    generator = torch.Generator().manual_seed(2)
    inputs = rounded(
        {
            "x": torch.randn(tokens, width, generator=generator),
            "weight": torch.randn(height, width, generator=generator) / width**0.5,
            "bias": torch.randn(height, generator=generator),
        },
        dtype,
    )
    sink = _Kept()

    def ours(leaves: Named) -> dict[str, Tensor]:
        return {"y": projected_linear(leaves["x"], leaves["weight"], leaves["bias"], sink)}

    def plain(leaves: Named) -> dict[str, Tensor]:
        return {"y": functional.linear(leaves["x"], leaves["weight"], leaves["bias"])}

    found = with_gradients(ours, leaves_of(inputs, setting.device, dtype))
    return compare(
        {**found, "dweight": sink.product},
        with_gradients(plain, leaves_of(inputs, setting.device, dtype)),
        with_gradients(plain, leaves_of(inputs, torch.device("cpu"), torch.float64)),
        rounding=torch.finfo(dtype).eps,
    )


def _lora(setting: Setting, dtype: torch.dtype, *, rank: int) -> dict[str, Any]:
    """The branch of fp32 adapters beside a layer of `dtype`, as PEFT has them."""
    tokens, width, height = (67, 40, 24) if setting.tiny else (4100, 512, 768)
    generator = torch.Generator().manual_seed(7)
    inputs = rounded(
        {
            "y": torch.randn(tokens, height, generator=generator),
            "x": torch.randn(tokens, width, generator=generator),
            "a": torch.randn(rank, width, generator=generator) / width**0.5,
            "b": torch.randn(height, rank, generator=generator) / rank**0.5,
        },
        dtype,
    )

    def of(operator: Callable[..., Tensor]) -> Loss:
        def computed(leaves: Named) -> dict[str, Tensor]:
            a, b = (
                leaves[name].to(torch.promote_types(leaves[name].dtype, torch.float32))
                for name in ("a", "b")
            )
            return {"z": operator(leaves["y"], leaves["x"], a, b, scaling=1.7, dropout=0.0)}

        return computed

    return three(setting, dtype, inputs, of(lora), of(lora_reference))


def _gaussian_matrix(setting: Setting) -> dict[str, Any]:
    """The device's matrix against the CPU's: the same numbers, but for one element in 10^8."""
    key = key_words(42, 0)
    rows = 100 if setting.tiny else 1000
    ours, truth = (
        gaussian_matrix(rows, 701, key=key, std=1 / 3, device=device)
        for device in (setting.device, torch.device("cpu"))
    )
    different = int((ours.cpu() != truth).sum())
    off = error(ours, truth.double())
    passed = different <= 1 and off <= torch.finfo(torch.float32).eps
    return {
        "status": "passed" if passed else "failed",
        "reason": None if passed else "numbers",
        "errors": {"matrix": {"ours": off}},
        "different_elements": different,
    }


def _gradient_times(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """G M in fp32 from factors in `dtype`, beside PyTorch's product of fp32 copies."""
    tokens, height, width, rank = (67, 24, 40, 5) if setting.tiny else (4100, 768, 512, 72)
    generator = torch.Generator().manual_seed(10)
    a = torch.randn(tokens, height, generator=generator).to(dtype)
    b = torch.randn(tokens, width, generator=generator).to(dtype)
    matrix = torch.randn(width, rank, generator=generator) / width**0.5
    moved = [x.to(setting.device) for x in (a, b, matrix)]
    return compare(
        {"product": gradient_times(*moved)},
        {"product": gradient_times_reference(*moved)},
        {"product": gradient_times_reference(a, b, matrix.double())},
        # products in TF32 parts are right to 2^-21; tensor cores cut sums that fp32 units round
        rounding=1e-5,
    )


def _squared_norm(setting: Setting) -> dict[str, Any]:
    """‖aᵀ b‖² without the product, whichever way is cheaper."""
    generator = torch.Generator().manual_seed(21)
    errors, allowed = {}, {}
    for tokens in (40, 700):  # fewer and more than a side
        a, b = (torch.randn(tokens, size, generator=generator) for size in (300, 200))
        found = gradient_squared_norm(a.to(setting.device), b.to(setting.device))
        errors[f"{tokens} tokens"] = error(found, (a.double().t() @ b.double()).norm() ** 2)
        allowed[f"{tokens} tokens"] = 1e-5
    return codes_row(errors, allowed, {})


def _snapshot(setting: Setting) -> dict[str, Any]:
    """`snapshot.pickle` of one block: it loads, and has segments and the block's history."""
    size = 48 * 2**20 + 512
    with AllocatorHistory(setting.device) as history:
        held = torch.empty(size, dtype=torch.uint8, device=setting.device)
        del held
    if history.unavailable is not None:
        return {"status": "skipped", "reason": history.unavailable}
    with tempfile.TemporaryDirectory(prefix="memrt-snapshot-") as folder:
        history.write(Path(folder))
        content = (Path(folder) / SNAPSHOT_NAME).read_bytes()
    found = pickle.loads(content)
    traces = [entry for trace in found["device_traces"] for entry in trace]
    own = [entry for entry in traces if entry.get("size") == size]
    actions = {entry["action"] for entry in own}
    stacks = [entry["frames"] for entry in own if entry["action"] == "alloc"]
    passed = {"alloc", "free_completed"} <= actions and all(stacks) and bool(found["segments"])
    return {
        "status": "passed" if passed else "failed",
        "reason": None if passed else "segments, traces or stacks",
        "num_bytes": len(content),
        "num_segments": len(found["segments"]),
        "num_traces": len(traces),
        "actions": sorted(actions),
    }


def _projected_update(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Decay and a lifted step of a weight in `dtype`, beside PyTorch's on an fp32 copy."""
    height, width, rank = (24, 40, 5) if setting.tiny else (768, 520, 72)
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(height, width, generator=generator).to(dtype)
    left = torch.randn(height, rank, generator=generator) / rank**0.5
    right = torch.randn(width, rank, generator=generator).t()
    step = {"alpha": -0.1, "decay": 0.9}
    ours, *factors = (x.to(setting.device) for x in (weight, left, right))
    plain = projected_update_reference(ours, *factors, **step).to(dtype)
    truth = projected_update_reference(weight, left.double(), right.double(), **step)
    ours = ours.clone()
    projected_update_(ours, *factors, **step)
    rounding = max(torch.finfo(dtype).eps, 2**-20)
    return compare({"weight": ours}, {"weight": plain}, {"weight": truth}, rounding=rounding)


def _subspace(setting: Setting, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """R against the exact product with the basis; captured energy against the best basis'."""
    rank, tokens = 8, 96
    generator = torch.Generator().manual_seed(4)
    scales = torch.arange(1, tokens + 1, dtype=torch.float32).rsqrt()[:, None]
    rows = (torch.randn(tokens, shape[0], generator=generator) * scales).to(dtype)
    columns = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    subspace = Subspace(shape, rank=rank, every=10, device=setting.device)
    subspace.begin_step(0)
    subspace.accumulate(rows.to(setting.device), columns.to(setting.device))
    basis, projected = subspace.tensors()["basis"], subspace.gradient()
    assert projected is not None
    wide = basis.cpu().double()
    gradient = rows.double().t() @ columns.double()
    truth = wide.t() @ gradient if subspace.side == "left" else gradient @ wide
    exact = torch.linalg.svdvals(gradient)
    captured = float(truth.norm() ** 2 / (exact[:rank] ** 2).sum())
    off = float((wide.t() @ wide - torch.eye(rank, dtype=torch.float64)).norm())
    from_truth = error(projected, truth)
    # fp32 sums over some hundred terms, of inputs in `dtype`, which both sides share
    passed = from_truth <= 1e-5 and captured >= 0.9 and off <= 1e-5
    return {
        "status": "passed" if passed else "failed",
        "reason": None if passed else "error, captured energy or orthonormality",
        "errors": {"R": {"ours": from_truth}},
        "captured_energy": captured,
        "orthonormality_error": off,
    }


def _cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for accumulate in ("float32", "weight"):
            for softcap in (None, 30.0):
                label = f"linear_cross_entropy {kind} accumulate={accumulate} softcap={softcap}"
                found[label] = partial(
                    _linear_cross_entropy, setting, dtype, accumulate=accumulate, softcap=softcap
                )
        found[f"projected_linear {kind}"] = partial(_projected_linear, setting, dtype)
        for rank in (16, 72):
            found[f"lora {kind} rank={rank}"] = partial(_lora, setting, dtype, rank=rank)
        found[f"gradient_times {kind}"] = partial(_gradient_times, setting, dtype)
        found[f"projected_update {kind}"] = partial(_projected_update, setting, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for shape in ((64, 200), (200, 64)):
            label = f"subspace {shape[0]}x{shape[1]} {kind}"
            found[label] = partial(_subspace, setting, shape, dtype)
    found["gaussian_matrix"] = partial(_gaussian_matrix, setting)
    found["gradient_squared_norm"] = partial(_squared_norm, setting)
    found["allocator snapshot"] = partial(_snapshot, setting)
    return {**found, **operator_layers.cases(setting), **operator_steps.cases(setting)}


def main(argv: Sequence[str] | None = None) -> int:
    """Fill operators.json."""
    setting = parse(argv, __doc__ or "")
    part = PartFile(setting, "operators")
    for name, measure in _cases(setting).items():
        part.case(name, measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
