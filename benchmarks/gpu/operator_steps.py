"""The optimizer's side: steps on moments of every format, APOLLO's and AdaLomo's, and rounding.

Steps on 8-bit, FP8 and 4-bit moments are held to the CPU's from the same trained state: weights by
their error, moments by their codes. Random bits of stochastic rounding come from a hash, so that
they are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import Setting
from benchmarks.gpu.comparison import Named, codes_row, compare, error
from memrt.kernels.adalomo import adalomo_, adalomo_reference
from memrt.kernels.adamw_fp8 import adamw_fp8
from memrt.kernels.adamw_int4 import adamw_int4, num_code_bytes
from memrt.kernels.adamw_int8 import adamw_int8, adamw_int8_reference
from memrt.kernels.adamw_step import num_groups
from memrt.kernels.dynamic_map import dynamic_map, num_blocks
from memrt.kernels.finite import all_finite
from memrt.kernels.formed_gradient import add_channels_, channel_norms
from memrt.kernels.stochastic_rounding import Rounding, rounding_key, stochastic_copy_
from memrt.optimizers.adamw import AdamW

__all__ = ["cases"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
NUM_ELEMENTS = 2**16 + 67
"""Neither groups nor programs come out even."""


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
    return compare(
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

    return compare(
        stepped(adalomo_, setting.device, None),
        stepped(adalomo_reference, setting.device, None),
        stepped(adalomo_reference, torch.device("cpu"), torch.float64),
        # sums of some thousand numbers
        rounding=4 * torch.finfo(torch.float32).eps,
    )


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

    return compare(
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
    errors = {"weight": {"ours": error(ours, truth.double())}}
    for name in ("exp_avg_scales", "exp_avg_sq_scales"):
        errors[name] = {"ours": error(ours_state[name], state[name].double())}
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


def _fp8_state(n: int) -> dict[str, Tensor]:
    groups = num_groups(n)
    return {
        "exp_avg_codes": torch.zeros(n, dtype=torch.uint8),
        "exp_avg_sq_codes": torch.zeros(n, dtype=torch.uint8),
        "exp_avg_largest": torch.zeros(groups),
        "exp_avg_sq_largest": torch.zeros(groups),
        "exp_avg_power": torch.zeros(groups, dtype=torch.uint8),
        "exp_avg_sq_power": torch.zeros(groups, dtype=torch.uint8),
    }


def _int4_state(n: int) -> dict[str, Tensor]:
    return {
        "exp_avg_codes": torch.zeros(num_code_bytes(n), dtype=torch.uint8),
        "exp_avg_sq_codes": torch.zeros(num_code_bytes(n), dtype=torch.uint8),
        "exp_avg_scales": torch.zeros(num_groups(n)),
        "exp_avg_sq_scales": torch.zeros(num_groups(n)),
    }


def _in_codes(
    setting: Setting,
    dtype: torch.dtype,
    *,
    step: Callable[..., None],
    state: Callable[[int], dict[str, Tensor]],
) -> dict[str, Any]:
    """A step on FP8 or 4-bit moments, from a state that has seen some gradients."""
    generator = torch.Generator().manual_seed(12)
    key = [123456789, 987654321] if dtype == torch.bfloat16 else None
    size = NUM_ELEMENTS // 16 if setting.tiny else NUM_ELEMENTS
    weight = torch.randn(size, generator=generator).to(dtype)
    kept = state(size)

    def gradient() -> Tensor:  # log-normal magnitudes, as a layer's gradients have
        scale = torch.exp(torch.randn(size, generator=generator))
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    for count in (1.0, 2.0, 3.0):
        step(weight, gradient(), **kept, step=torch.tensor(count), rounding_key=key, **ADAMW)
    last = gradient()
    ours = weight.to(setting.device, copy=True)
    moved = {name: value.to(setting.device, copy=True) for name, value in kept.items()}
    number = torch.tensor(4.0)
    step(ours, last.to(setting.device), **moved, step=number, rounding_key=key, **ADAMW)
    step(weight, last, **kept, step=number, rounding_key=key, **ADAMW)
    wide = {name for name, value in kept.items() if value.is_floating_point()}
    found = {"weight": error(ours, weight.double())}
    found |= {name: error(moved[name], kept[name].double()) for name in sorted(wide)}
    return codes_row(
        found,
        {"weight": torch.finfo(dtype).eps, **dict.fromkeys(wide, 1e-6)},
        {
            name: float((moved[name].cpu() != value).float().mean())
            for name, value in kept.items()
            if name not in wide
        },
    )


def _many(setting: Setting, dtype: torch.dtype, state_format: str) -> dict[str, Any]:
    """Steps of the optimizer itself on parameters of several sizes, beside the CPU's."""
    sizes = (20_001, 4096, 67, 8193, 8192)

    def stepped(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(23)
        weights = [
            torch.nn.Parameter(torch.randn(size, generator=generator).to(device, dtype))
            for size in sizes
        ]
        optimizer = AdamW(weights, lr=1e-2, weight_decay=0.1, state_format=state_format)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).to(device, dtype)
            optimizer.step()
        values = [value for weight in weights for value in optimizer.state[weight].values()]
        codes = [value.cpu() for value in values if value.dtype == torch.uint8]
        return [weight.detach() for weight in weights], codes

    ours, codes = stepped(setting.device)
    truth, true_codes = stepped(torch.device("cpu"))
    different = [
        float((found != wanted).float().mean())
        for found, wanted in zip(codes, true_codes, strict=True)
    ]
    return codes_row(
        {
            str(size): error(found, wanted.double())
            for size, found, wanted in zip(sizes, ours, truth, strict=True)
        },
        {str(size): 2 * torch.finfo(dtype).eps for size in sizes},
        {f"state tensor {index}": share for index, share in enumerate(different)},
    )


def _rounding(setting: Setting) -> dict[str, Any]:
    """fp32 to bf16: the CPU's bits, whole and around the 2^32nd element."""
    source = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(13))
    different = {}
    for first in (0, 2**32 - 5):
        found = []
        for device in (setting.device, torch.device("cpu")):
            target = torch.empty(NUM_ELEMENTS, dtype=torch.bfloat16, device=device)
            rounding = Rounding(rounding_key(42, 3), torch.tensor(7.0, device=device))
            stochastic_copy_(target, source.to(device), rounding=rounding, first_index=first)
            found.append(target.cpu())
        different[f"from {first}"] = float((found[0] != found[1]).float().mean())
    row = codes_row({}, {}, different)
    return row if not any(different.values()) else {**row, "status": "failed", "reason": "bits"}


def _finite(setting: Setting) -> dict[str, Any]:
    """One element that is not finite, anywhere, is seen."""
    tensors = [torch.ones(size, device=setting.device) for size in (1, 1000, NUM_ELEMENTS)]
    sound = bool(all_finite(tensors))
    seen = []
    for value in (float("inf"), float("-inf"), float("nan")):
        for tensor in tensors:
            tensor[-1] = value
            seen.append(not all_finite(tensors))
            tensor[-1] = 1.0
    passed = sound and all(seen)
    return {"status": "passed" if passed else "failed", "reason": None if passed else str(seen)}


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is checked, by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        found[f"adamw {kind}"] = partial(_adamw, setting, dtype)
        found[f"adamw_int8 {kind}"] = partial(_adamw_int8, setting, dtype)
        for name, step, state in (
            ("adamw_fp8", adamw_fp8, _fp8_state),
            ("adamw_int4", adamw_int4, _int4_state),
        ):
            found[f"{name} {kind}"] = partial(_in_codes, setting, dtype, step=step, state=state)
        for state_format in ("float32", "fp8", "int4"):
            found[f"optimizer {state_format} {kind}"] = partial(_many, setting, dtype, state_format)
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for shape in ((1000, 3001), (3001, 1000)):
            size = f"{shape[0]}x{shape[1]} {kind}"
            found[f"apollo {size}"] = partial(_apollo, setting, shape, dtype)
            found[f"adalomo {size}"] = partial(_adalomo, setting, shape, dtype)
    found["stochastic_copy"] = partial(_rounding, setting)
    found["all_finite"] = partial(_finite, setting)
    return found
