"""How fast memrt's kernels are: beside the card's copies, and beside plain PyTorch's formula.

Sizes are a layer's of 8B (its MLP, 4096 x 14336) and 8,192 tokens, in bf16. `bytes` are what must
be read and written at least, each once; over the time, as a share of what the card copies in a
second. Products of matrices are bound by arithmetic, not by these bytes: read their time beside
plain PyTorch's. Forward alone; the device is waited for after each call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import PartFile, Setting, empty, parse, synchronize
from benchmarks.gpu.packing import nf4_problem
from benchmarks.gpu.updates import copy_bytes_per_second
from memrt.kernels.adalomo import adalomo_, adalomo_reference
from memrt.kernels.counter_hash import key_words
from memrt.kernels.formed_gradient import add_channels_, channel_norms
from memrt.kernels.gaussian_matrix import gaussian_matrix
from memrt.kernels.gradient_products import gradient_times, gradient_times_reference
from memrt.kernels.int8_weights import int8_bytes, int8_dequantize, int8_quantize
from memrt.kernels.ladder import ladder_down, ladder_reference
from memrt.kernels.lora import lora, lora_reference
from memrt.kernels.nf4 import nf4_bytes, nf4_dequantize, nf4_quantize
from memrt.kernels.projected_update import projected_update_, projected_update_reference
from memrt.kernels.stochastic_rounding import Rounding, rounding_key, stochastic_copy_

__all__ = ["main"]

WARM_UP, TIMED = 2, 7
RANK, SIDE = 128, 512
ADALOMO = {"lr": 1e-3, "weight_decay": 0.1, "eps": (1e-30, 1e-3), "clip_threshold": 1.0}

Call = Callable[[], object]
Timed = tuple[Call, Call | None, int]
"""The operator, the formula in plain PyTorch, and the bytes that must move."""


def _seconds(call: Call, device: torch.device) -> float:
    times = []
    for index in range(WARM_UP + TIMED):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        if index >= WARM_UP:
            times.append(time.perf_counter() - began)
    return median(times)


class _Inputs:
    """Tensors of a layer."""

    def __init__(self, setting: Setting) -> None:
        self.device = setting.device
        self.rows, self.columns = (64, 128) if setting.tiny else (4096, 14_336)
        self.tokens = 67 if setting.tiny else 8192
        self.rank, self.side = (8, 16) if setting.tiny else (RANK, SIDE)
        torch.manual_seed(0)

    def made(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype) / shape[-1] ** 0.5

    def weight(self) -> Tensor:
        return self.made(self.rows, self.columns)


def _packed(given: _Inputs, name: str) -> Timed:
    shape, weight = [given.rows, given.columns], given.weight()
    n = weight.numel()
    if name == "int8_quantize":
        return lambda: int8_quantize(weight, 0), None, 2 * n + int8_bytes(shape, 0)
    if name == "nf4_quantize":
        return lambda: nf4_quantize(weight), None, 2 * n + nf4_bytes(n)
    if name == "int8_dequantize":
        codes = int8_quantize(weight, 0)
        call: Call = lambda: int8_dequantize(codes, shape, 0, weight.dtype)  # noqa: E731
        return call, None, 2 * n + int8_bytes(shape, 0)
    packed = nf4_quantize(weight)
    return lambda: nf4_dequantize(packed, shape, weight.dtype), None, 2 * n + nf4_bytes(n)


def _ladder(given: _Inputs) -> Timed:
    hidden, state = given.made(given.tokens, given.rows), given.made(given.tokens, given.side)
    weight = given.made(given.side, given.rows).requires_grad_()
    bias, gate = given.made(given.side), torch.rand(given.side, device=given.device)
    moved = 2 * (hidden.numel() + 3 * state.numel() + weight.numel())
    plain = partial(ladder_reference, hidden, weight, bias, state, gate.bfloat16())
    return partial(ladder_down, hidden, weight, bias, state, gate), plain, moved


def _lora(given: _Inputs) -> Timed:
    output, x = given.made(given.tokens, given.columns), given.made(given.tokens, given.rows)
    a = given.made(16, given.rows, dtype=torch.float32).requires_grad_()
    b = given.made(given.columns, 16, dtype=torch.float32).requires_grad_()
    options: dict[str, Any] = {"scaling": 2.0, "dropout": 0.0}
    moved = 2 * (2 * output.numel() + x.numel())
    plain = partial(lora_reference, output, x, a, b, **options)
    return partial(lora, output, x, a, b, **options), plain, moved


def _projection(given: _Inputs) -> Timed:
    rows, columns = given.made(given.tokens, given.rows), given.made(given.tokens, given.columns)
    basis = given.made(given.rows, given.rank, dtype=torch.float32)
    moved = 2 * (rows.numel() + columns.numel()) + 4 * (basis.numel() + given.columns * given.rank)
    plain = partial(gradient_times_reference, columns, rows, basis)
    return partial(gradient_times, columns, rows, basis), plain, moved


def _lift(given: _Inputs) -> Timed:
    weight = given.weight()
    left = given.made(given.rows, given.rank, dtype=torch.float32)
    right = given.made(given.rank, given.columns, dtype=torch.float32)
    plain = partial(projected_update_reference, weight, left, right, alpha=-1e-4, decay=0.9)
    call = partial(projected_update_, weight, left, right, alpha=-1e-4, decay=0.9)
    return call, plain, 4 * weight.numel() + 4 * (left.numel() + right.numel())


def _channels(given: _Inputs, name: str) -> Timed:
    weight, gradient = given.weight(), given.weight()
    if name == "channel_norms":
        plain = partial(torch.linalg.vector_norm, gradient, dim=0, dtype=torch.float32)
        return partial(channel_norms, gradient, left=True), plain, 2 * gradient.numel()
    factors = torch.rand(given.columns, device=given.device)
    call = partial(add_channels_, weight, gradient, factors, alpha=-1e-4, left=True)
    return call, None, 6 * weight.numel()


def _adalomo(given: _Inputs) -> Timed:
    weight, gradient = given.weight(), given.weight()
    row, column = (torch.rand(size, device=given.device) + 0.1 for size in weight.shape)
    fresh = torch.tensor(0.3, device=given.device)
    arguments = (weight, gradient, row, column, fresh)
    plain = partial(adalomo_reference, *arguments, **ADALOMO)
    return partial(adalomo_, *arguments, **ADALOMO), plain, 10 * weight.numel()


def _stochastic(given: _Inputs) -> Timed:
    source = given.made(given.rows, given.columns, dtype=torch.float32)
    target = torch.empty_like(source, dtype=torch.bfloat16)
    rounding = Rounding(rounding_key(1, 2), torch.tensor(3.0, device=given.device))
    call = partial(stochastic_copy_, target, source, rounding=rounding)
    return call, partial(target.copy_, source), 6 * source.numel()


def _gaussian(given: _Inputs) -> Timed:
    shape = (given.rows, given.columns // 8)
    call = partial(gaussian_matrix, *shape, key=key_words(1, 2), std=1.0, device=given.device)
    plain = partial(torch.randn, *shape, device=given.device)
    return call, plain, 4 * shape[0] * shape[1]


KERNELS: dict[str, Callable[[_Inputs], Timed]] = {
    "ladder_down": _ladder,
    "lora": _lora,
    "gradient_times": _projection,
    "projected_update": _lift,
    "channel_norms": lambda given: _channels(given, "channel_norms"),
    "add_channels": lambda given: _channels(given, "add_channels"),
    "adalomo": _adalomo,
    "stochastic_copy": _stochastic,
    "gaussian_matrix": _gaussian,
    **{
        name: partial(_packed, name=name)
        for name in ("nf4_quantize", "nf4_dequantize", "int8_quantize", "int8_dequantize")
    },
}


def _row(setting: Setting, name: str, bandwidth: float, problem: str | None) -> dict[str, Any]:
    if name.startswith("nf4") and problem is not None:
        return {"status": "skipped", "reason": problem}
    empty(setting.device)
    call, plain, num_bytes = KERNELS[name](_Inputs(setting))
    seconds = _seconds(call, setting.device)
    return {
        "seconds_of_call": seconds,
        "plain_seconds": None if plain is None else _seconds(plain, setting.device),
        "bytes": num_bytes,
        "share_of_copy": num_bytes / seconds / bandwidth,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Fill kernels.json."""
    setting = parse(argv, __doc__ or "")
    part = PartFile(setting, "kernels")
    bandwidth, problem = copy_bytes_per_second(setting), nf4_problem(setting.device)
    part.add("copy_bytes_per_second", bandwidth)
    for name in KERNELS:
        part.case(name, partial(_row, setting, name, bandwidth, problem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
