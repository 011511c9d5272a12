"""memrt's operators on the device against fp64: no worse than plain PyTorch in the same dtype.

For each operator and dtype the same random inputs go through three computations: the operator on
the device, plain PyTorch on the device in the same dtype, and plain PyTorch on the CPU in fp64 (the
truth). The error of a result is ‖result - truth‖ / ‖truth‖; the operator's must be at most twice
plain PyTorch's, plus the dtype's own rounding. For GaLore's subspace the truth is the exact product
with its basis, and the energy that the best subspace of that rank captures; for the 8-bit AdamW
step, its formula in fp32 on the CPU from the same state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.common import PartFile, Setting, parse
from memrt.kernels.adalomo import adalomo_, adalomo_reference
from memrt.kernels.adamw_int8 import adamw_int8, adamw_int8_reference
from memrt.kernels.dynamic_map import dynamic_map, num_blocks
from memrt.kernels.formed_gradient import add_channels_, channel_norms
from memrt.kernels.gaussian_matrix import gaussian_matrix, matrix_key
from memrt.kernels.gradient_products import gradient_times, gradient_times_reference
from memrt.kernels.linear_cross_entropy import linear_cross_entropy
from memrt.kernels.lora import lora, lora_reference
from memrt.kernels.projected_linear import projected_linear
from memrt.kernels.projected_update import projected_update_, projected_update_reference
from memrt.optimizers.adamw import AdamW
from memrt.optimizers.subspace import Subspace

__all__ = ["main"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACTOR = 2.0
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}

Named = Mapping[str, Tensor]


def _error(result: Tensor, truth: Tensor) -> float:
    truth = truth.detach()
    difference = (result.detach().cpu().double() - truth).norm()
    return float(difference / truth.norm().clamp(min=1e-30))


def _compare(ours: Named, plain: Named, truth: Named, *, rounding: float) -> dict[str, Any]:
    """A row: the error of every result, and whether all are as small as plain PyTorch's."""
    errors = {
        name: {"ours": _error(ours[name], truth[name]), "plain": _error(plain[name], truth[name])}
        for name in truth
    }
    # written so that NaN, which compares as false, does not pass
    wrong = [
        name
        for name, each in errors.items()
        if not each["ours"] <= FACTOR * each["plain"] + rounding
    ]
    return {
        "status": "failed" if wrong else "passed",
        "reason": ", ".join(wrong) or None,
        "errors": errors,
    }


def _leaves(inputs: Named, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: value.to(device=device, dtype=dtype).requires_grad_(True)
        for name, value in inputs.items()
    }


Loss = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def _with_gradients(compute: Loss, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results, and the gradients of their first one summed against fixed weights."""
    results = compute(leaves)
    first = next(iter(results.values()))
    if first.dim():
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(first.shape, generator=generator).to(first.device, first.dtype)
        first = (first * weights).sum()
    first.backward()
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {**results, **gradients}


def _rounded(inputs: Named, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs that the dtype can hold, so that all three computations get the same ones."""
    return {name: value.to(dtype).double() for name, value in inputs.items()}


def _linear_cross_entropy(
    setting: Setting, dtype: torch.dtype, *, accumulate: str, softcap: float | None
) -> dict[str, Any]:
    tokens, hidden, vocabulary = (67, 40, 301) if setting.tiny else (1000, 512, 5003)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::5] = -100
    inputs = _rounded(
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

    return _three(setting, dtype, inputs, ours, plain)


def _three(
    setting: Setting, dtype: torch.dtype, inputs: Named, ours: Loss, plain: Loss
) -> dict[str, Any]:
    return _compare(
        _with_gradients(ours, _leaves(inputs, setting.device, dtype)),
        _with_gradients(plain, _leaves(inputs, setting.device, dtype)),
        _with_gradients(plain, _leaves(inputs, torch.device("cpu"), torch.float64)),
        rounding=torch.finfo(dtype).eps,
    )


class _Kept:
    """A gradient sink that keeps the two factors."""

    def accumulate(self, rows: Tensor, columns: Tensor) -> None:
        self.product = rows.t() @ columns


def _projected_linear(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """The layer, with a sink that forms the product which the strategy never forms."""
    tokens, width, height = (67, 40, 24) if setting.tiny else (1000, 512, 768)
    generator = torch.Generator().manual_seed(2)
    inputs = _rounded(
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

    found = _with_gradients(ours, _leaves(inputs, setting.device, dtype))
    return _compare(
        {**found, "dweight": sink.product},
        _with_gradients(plain, _leaves(inputs, setting.device, dtype)),
        _with_gradients(plain, _leaves(inputs, torch.device("cpu"), torch.float64)),
        rounding=torch.finfo(dtype).eps,
    )


def _lora(setting: Setting, dtype: torch.dtype, *, rank: int) -> dict[str, Any]:
    """The branch of fp32 adapters beside a layer of `dtype`, as PEFT has them."""
    tokens, width, height = (67, 40, 24) if setting.tiny else (4100, 512, 768)
    generator = torch.Generator().manual_seed(7)
    inputs = _rounded(
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

    return _three(setting, dtype, inputs, of(lora), of(lora_reference))


def _gaussian_matrix(setting: Setting) -> dict[str, Any]:
    """The device's matrix against the CPU's: the same numbers, but for one element in 10^8."""
    key = matrix_key(42, 0)
    ours, truth = (
        gaussian_matrix(1000, 701, key=key, std=1 / 3, device=device)
        for device in (setting.device, torch.device("cpu"))
    )
    different = int((ours.cpu() != truth).sum())
    error = _error(ours, truth.double())
    passed = different <= 1 and error <= torch.finfo(torch.float32).eps
    return {
        "status": "passed" if passed else "failed",
        "reason": None if passed else "numbers",
        "errors": {"matrix": {"ours": error}},
        "different_elements": different,
    }


def _apollo(setting: Setting, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Norms by channel, and the weight after decay and a gradient scaled by channel."""
    generator = torch.Generator().manual_seed(8)
    given = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    factors, left = torch.rand(max(shape), generator=generator), shape[0] < shape[1]

    def plain(device: torch.device, kind: torch.dtype) -> dict[str, Tensor]:
        weight, gradient = (tensor.to(device, kind) for tensor in given)
        scale = factors.to(device, kind).unsqueeze(0 if left else 1)
        return {
            "norms": torch.linalg.vector_norm(gradient, dim=0 if left else 1),
            "weight": 0.9 * weight - 0.5 * (gradient * scale),
        }

    weight, gradient = (tensor.to(setting.device, copy=True) for tensor in given)
    norms = channel_norms(gradient, left=left)
    moved = factors.to(setting.device)
    add_channels_(weight, gradient, moved, alpha=-0.5, decay=0.9, left=left)
    return _compare(
        {"norms": norms, "weight": weight},
        plain(setting.device, dtype),
        plain(torch.device("cpu"), torch.float64),
        rounding=torch.finfo(dtype).eps / 2,
    )


def _adalomo(setting: Setting, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """A step of weight and factored second moment."""
    generator = torch.Generator().manual_seed(9)
    weight, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    moments = [torch.rand(size, generator=generator) + 0.1 for size in shape]
    options = {"lr": 0.05, "weight_decay": 0.1, "eps": (1e-30, 1e-3), "clip_threshold": 0.8}

    def stepped(step: Any, device: torch.device, kind: torch.dtype | None) -> dict[str, Tensor]:
        narrow = [tensor.to(device, kind or dtype, copy=True) for tensor in (weight, gradient)]
        wide = [
            tensor.to(device, kind or torch.float32, copy=True)
            for tensor in (*moments, torch.tensor(0.3))
        ]
        step(*narrow, *wide, **options)
        return {"weight": narrow[0], "row": wide[0], "column": wide[1]}

    return _compare(
        stepped(adalomo_, setting.device, None),
        stepped(adalomo_reference, setting.device, None),
        stepped(adalomo_reference, torch.device("cpu"), torch.float64),
        # sums of some thousand numbers
        rounding=4 * torch.finfo(torch.float32).eps,
    )


def _gradient_times(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """G M in fp32 from factors in `dtype`, beside PyTorch's product of fp32 copies."""
    tokens, height, width, rank = (67, 24, 40, 5) if setting.tiny else (4100, 768, 512, 72)
    generator = torch.Generator().manual_seed(10)
    a = torch.randn(tokens, height, generator=generator).to(dtype)
    b = torch.randn(tokens, width, generator=generator).to(dtype)
    matrix = torch.randn(width, rank, generator=generator) / width**0.5
    moved = [x.to(setting.device) for x in (a, b, matrix)]
    return _compare(
        {"product": gradient_times(*moved)},
        {"product": gradient_times_reference(*moved)},
        {"product": gradient_times_reference(a, b, matrix.double())},
        # products in TF32 parts are right to 2^-21; tensor cores cut sums that fp32 units round
        rounding=1e-5,
    )


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
    return _compare({"weight": ours}, {"weight": plain}, {"weight": truth}, rounding=rounding)


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
    error = _error(projected, truth)
    # fp32 sums over some hundred terms, of inputs in `dtype`, which both sides share
    passed = error <= 1e-5 and captured >= 0.9 and off <= 1e-5
    return {
        "status": "passed" if passed else "failed",
        "reason": None if passed else "error, captured energy or orthonormality",
        "errors": {"R": {"ours": error}},
        "captured_energy": captured,
        "orthonormality_error": off,
    }


def _adamw(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Five steps of memrt's AdamW, against torch's in fp32 and in fp64."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(5001, generator=generator).to(dtype)
    gradients = [torch.randn(5001, generator=generator).to(dtype) for _ in range(5)]

    def stepped(make: Any, kind: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        weight = torch.nn.Parameter(start.clone().to(device, kind))
        optimizer = make([weight], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        for gradient in gradients:
            weight.grad = gradient.to(device, kind)
            optimizer.step()
        return {"weight": weight.detach()}

    return _compare(
        stepped(AdamW, dtype, setting.device),
        stepped(torch.optim.AdamW, torch.float32, setting.device),
        stepped(torch.optim.AdamW, torch.float64, torch.device("cpu")),
        # a weight is rounded to `dtype` once a step
        rounding=len(gradients) * torch.finfo(dtype).eps / 2,
    )


def _adamw_int8(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """A step of a trained state: weights, scales, and how many codes differ."""
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        return {"status": "skipped", "reason": "bitsandbytes is not installed"}
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(5001, generator=generator).to(dtype)
    state = {
        "exp_avg_codes": torch.zeros(5001, dtype=torch.uint8),
        "exp_avg_sq_codes": torch.zeros(5001, dtype=torch.uint8),
        "exp_avg_scales": torch.zeros(num_blocks(5001)),
        "exp_avg_sq_scales": torch.zeros(num_blocks(5001)),
    }
    maps = {
        "exp_avg_map": torch.tensor(dynamic_map(signed=True)),
        "exp_avg_sq_map": torch.tensor(dynamic_map(signed=False)),
    }
    for step in range(1, 4):  # a state that has seen some gradients
        gradient = torch.randn(5001, generator=generator).to(dtype)
        number = torch.tensor(float(step))
        adamw_int8_reference(weight, gradient, **state, **maps, step=number, **ADAMW)
    gradient = torch.randn(5001, generator=generator).to(dtype)
    moved = {name: value.clone().to(setting.device) for name, value in state.items()}
    ours = weight.clone().to(setting.device)
    on_device = {name: value.to(setting.device) for name, value in maps.items()}
    number = torch.tensor(4.0)
    adamw_int8(ours, gradient.to(setting.device), **moved, **on_device, step=number, **ADAMW)
    adamw_int8_reference(weight, gradient, **state, **maps, step=number, **ADAMW)
    return _int8_row(ours, moved, weight, state, dtype)


def _int8_row(
    ours: Tensor, ours_state: Named, truth: Tensor, state: Named, dtype: torch.dtype
) -> dict[str, Any]:
    errors = {"weight": {"ours": _error(ours, truth.double())}}
    for name in ("exp_avg_scales", "exp_avg_sq_scales"):
        errors[name] = {"ours": _error(ours_state[name], state[name].double())}
    distance = {
        name: int((ours_state[name].cpu().int() - state[name].int()).abs().max())
        for name in ("exp_avg_codes", "exp_avg_sq_codes")
    }
    # the moments are sums of fp32 products; a code may fall to the neighbour at a boundary
    passed = (
        errors["weight"]["ours"] <= 8 * torch.finfo(dtype).eps
        and max(errors[n]["ours"] for n in ("exp_avg_scales", "exp_avg_sq_scales")) <= 1e-6
        and max(distance.values()) <= 1
    )
    return {
        "status": "passed" if passed else "failed",
        "reason": None if passed else "weight, scales or codes",
        "errors": errors,
        "largest_code_distance": distance,
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
        found[f"adamw {kind}"] = partial(_adamw, setting, dtype)
        found[f"adamw_int8 {kind}"] = partial(_adamw_int8, setting, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for shape in ((64, 200), (200, 64)):
            label = f"subspace {shape[0]}x{shape[1]} {kind}"
            found[label] = partial(_subspace, setting, shape, dtype)
        for shape in ((1000, 3001), (3001, 1000)):
            size = f"{shape[0]}x{shape[1]} {kind}"
            found[f"apollo {size}"] = partial(_apollo, setting, shape, dtype)
            found[f"adalomo {size}"] = partial(_adalomo, setting, shape, dtype)
    found["gaussian_matrix"] = partial(_gaussian_matrix, setting)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Fill operators.json."""
    setting = parse(argv, __doc__ or "")
    part = PartFile(setting, "operators")
    for name, measure in _cases(setting).items():
        part.case(name, measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
