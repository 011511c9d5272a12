"""Layers of frozen and side networks: packed weights, rungs, gated products, cross entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.common import Setting
from benchmarks.gpu.comparison import (
    Named,
    codes_row,
    compare,
    error,
    leaves_of,
    rounded,
    three,
    with_gradients,
)
from benchmarks.gpu.packing import nf4_problem
from memrt.kernels.cross_entropy import cross_entropy_
from memrt.kernels.frozen_linear import frozen_linear
from memrt.kernels.gated_product import gated_product
from memrt.kernels.int8_weights import (
    int8_dequantize,
    int8_quantize,
    int8_quantize_reference,
)
from memrt.kernels.ladder import ladder_down, ladder_mix, ladder_reference
from memrt.kernels.microscaled_fp8 import microscale, restore
from memrt.kernels.nf4 import (
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_quantize,
    nf4_quantize_reference,
)
from memrt.kernels.uniform_int4 import int4_dequantize, int4_quantize

__all__ = ["cases"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8_ROUNDING = 2**-4
"""E4M3 has three bits behind the first."""
SUM_ROUNDING = 1e-4
"""Of a sum of some hundred thousand fp32 numbers of either sign."""


def _wide(tensor: Tensor) -> Tensor:
    """A gate has fp32 beside a state of any dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _ladder(setting: Setting, dtype: torch.dtype, *, kept: str, vector: bool) -> dict[str, Any]:
    """A rung: down-projection, gate and sum; the hidden state has no gradient."""
    tokens, hidden, side = (67, 40, 24) if setting.tiny else (4100, 1000, 72)
    generator = torch.Generator().manual_seed(14)
    inputs = rounded(
        {
            "state": torch.randn(tokens, side, generator=generator),
            "hidden": torch.randn(tokens, hidden, generator=generator),
            "weight": torch.randn(side, hidden, generator=generator) / hidden**0.5,
            "bias": torch.randn(side, generator=generator),
            "gate": torch.rand(side if vector else 1, generator=generator),
        },
        dtype,
    )

    def plain(leaves: Named) -> dict[str, Tensor]:
        gate = _wide(leaves["gate"]).to(leaves["state"].dtype)
        given = leaves["hidden"].detach(), leaves["weight"], leaves["bias"], leaves["state"], gate
        return {"mixed": ladder_reference(*given)}

    def ours(leaves: Named) -> dict[str, Tensor]:
        given = leaves["hidden"], leaves["weight"], leaves["bias"], leaves["state"]
        return {"mixed": ladder_down(*given, _wide(leaves["gate"]), kept=kept)}

    coarse = {"dweight": FLOAT8_ROUNDING} if kept == "float8" else {}
    if not vector:  # one number, whose terms have either sign
        coarse["dgate"] = max(4 * torch.finfo(dtype).eps, SUM_ROUNDING)
    return three(setting, dtype, inputs, ours, plain, coarse=coarse)


def _mix(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Gate and sum alone."""
    generator = torch.Generator().manual_seed(15)
    inputs = rounded(
        {
            "down": torch.randn(1000, 72, generator=generator),
            "state": torch.randn(1000, 72, generator=generator),
            "gate": torch.rand(72, generator=generator),
        },
        dtype,
    )

    def plain(leaves: Named) -> dict[str, Tensor]:
        gate = _wide(leaves["gate"]).to(leaves["state"].dtype)
        return {"mixed": gate * leaves["state"] + (1 - gate) * leaves["down"]}

    def ours(leaves: Named) -> dict[str, Tensor]:
        return {"mixed": ladder_mix(leaves["down"], leaves["state"], _wide(leaves["gate"]))}

    return three(setting, dtype, inputs, ours, plain)


def _frozen(
    setting: Setting,
    dtype: torch.dtype,
    *,
    pack: Callable[[Tensor], Tensor],
    dense: Callable[[Tensor, Sequence[int], torch.dtype], Tensor],
    problem: str | None = None,
) -> dict[str, Any]:
    """A linear layer over a packed weight, beside one over the same weight kept dense."""
    if problem is not None:
        return {"status": "skipped", "reason": problem}
    tokens, width, height = (67, 128, 64) if setting.tiny else (1000, 1024, 704)
    generator = torch.Generator().manual_seed(16)
    weight = torch.randn(height, width, generator=generator).to(dtype) / width**0.5
    packed = pack(weight.to(setting.device))
    kept = dense(packed, weight.shape, dtype)
    inputs = rounded(
        {
            "x": torch.randn(tokens, width, generator=generator),
            "bias": torch.randn(height, generator=generator),
        },
        dtype,
    )

    def ours(leaves: Named) -> dict[str, Tensor]:
        def make(given: Tensor) -> Tensor:
            return dense(given, weight.shape, dtype)

        return {"y": frozen_linear(leaves["x"], packed, leaves["bias"], make)}

    def plain(leaves: Named) -> dict[str, Tensor]:
        return {"y": functional.linear(leaves["x"], kept.to(leaves["x"]), leaves["bias"])}

    return three(setting, dtype, inputs, ours, plain)


def _int8_dense(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    result: Tensor = int8_dequantize(packed, list(shape), 0, dtype)
    return result


def _nf4_dense(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    result: Tensor = nf4_dequantize(packed, list(shape), dtype)
    return result


def _nf4_codes(setting: Setting, problem: str | None) -> dict[str, Any]:
    """What the device packs, and what it makes of it, beside the formulas in plain PyTorch."""
    if problem is not None:
        return {"status": "skipped", "reason": problem}
    weight = torch.randn(321, 200, generator=torch.Generator().manual_seed(17))
    packed = nf4_quantize(weight.to(setting.device)).cpu()
    reference = nf4_quantize_reference(weight)
    back = nf4_dequantize(packed.to(setting.device), weight.shape, torch.float32)
    codes = weight.numel() // 2
    return codes_row(
        {"dense": error(back, nf4_dequantize_reference(packed, weight.shape, back.dtype).double())},
        {"dense": 1e-6},
        {"codes": float((packed[:codes] != reference[:codes]).float().mean())},
    )


def _int8_codes(setting: Setting) -> dict[str, Any]:
    """Codes and scales, beside the formula in plain PyTorch."""
    weight = torch.randn(321, 200, generator=torch.Generator().manual_seed(18))
    packed = int8_quantize(weight.to(setting.device), 0)
    codes, scales = int8_quantize_reference(weight, 0)
    found = packed.cpu()[: weight.numel()].view(torch.int8).view_as(codes)
    back = _int8_dense(packed, weight.shape, torch.float32)
    return codes_row(
        {"dense": error(back, found.double() * scales.double())},
        {"dense": 1e-6},
        {"codes": float((found != codes).float().mean())},
    )


def _tap_codes(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Eight bits of a hidden state, which a rung writes while it multiplies: the CPU's bits."""
    generator = torch.Generator().manual_seed(23)
    given = {
        "hidden": torch.randn(321, 200, generator=generator),
        "weight": torch.randn(72, 200, generator=generator),
    }
    hidden, weight = rounded(given, dtype).values()
    moved = hidden.to(setting.device), weight.to(setting.device)
    *_, ours, powers = torch.ops.memrt.ladder_down(*moved, None, None, None, True)
    codes, exponents = microscale(hidden)
    different = {
        "codes": float((ours.cpu().view(torch.uint8) != codes.view(torch.uint8)).float().mean()),
        "exponents": float((powers.cpu() != exponents).float().mean()),
    }
    back = restore(ours, powers, torch.float32)
    return codes_row({"dense": error(back, hidden.double())}, {"dense": FLOAT8_ROUNDING}, different)


def _uniform_int4(setting: Setting) -> dict[str, Any]:
    """Four-bit codes of a basis and what they stand for: the CPU's bits."""
    values = torch.randn(321, 201, generator=torch.Generator().manual_seed(22))
    ours, expected = int4_quantize(values.to(setting.device)), int4_quantize(values)
    back, wanted = int4_dequantize(ours, (321, 201)), int4_dequantize(expected, (321, 201))
    names = ("codes", "scales", "minima")
    different = {
        name: float((found.cpu() != truth).float().mean())
        for name, found, truth in zip(names, ours, expected, strict=True)
    }
    return codes_row({"dense": error(back, wanted.double())}, {"dense": 1e-6}, different)


def _gated(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """SiLU of the gate times the other half."""
    generator = torch.Generator().manual_seed(19)
    shape = (67, 40) if setting.tiny else (1000, 704)
    inputs = rounded(
        {name: torch.randn(*shape, generator=generator) for name in ("gate", "up")}, dtype
    )

    def plain(leaves: Named) -> dict[str, Tensor]:
        return {"product": functional.silu(leaves["gate"]) * leaves["up"]}

    def ours(leaves: Named) -> dict[str, Tensor]:
        return {"product": gated_product(leaves["gate"], leaves["up"], functional.silu)}

    return three(setting, dtype, inputs, ours, plain)


def _cross_entropy(setting: Setting, dtype: torch.dtype, softcap: float | None) -> dict[str, Any]:
    """Logits that become their own gradient."""
    rows, vocabulary = (67, 301) if setting.tiny else (1000, 5003)
    generator = torch.Generator().manual_seed(20)
    logits = rounded({"logits": 3 * torch.randn(rows, vocabulary, generator=generator)}, dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::5] = -100

    def plain(leaves: Named) -> dict[str, Tensor]:
        wide = _wide(leaves["logits"])
        if softcap is not None:
            wide = softcap * torch.tanh(wide / softcap)
        loss = functional.cross_entropy(wide, labels.to(wide.device), reduction="sum")
        return {"loss": loss}

    own = logits["logits"].to(setting.device, dtype)
    there = labels.to(setting.device)
    scale = (there != -100).to(torch.float32)
    loss = cross_entropy_(own, there, row_scale=scale, softcap=softcap)
    return compare(
        {"loss": loss, "dlogits": own},
        with_gradients(plain, leaves_of(logits, setting.device, dtype)),
        with_gradients(plain, leaves_of(logits, torch.device("cpu"), torch.float64)),
        rounding=torch.finfo(dtype).eps,
    )


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is checked, by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    problem = nf4_problem(setting.device)
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for kept in ("exact", "float8"):
            for gate in ("scalar", "vector"):
                found[f"ladder_down {kind} kept={kept} gate={gate}"] = partial(
                    _ladder, setting, dtype, kept=kept, vector=gate == "vector"
                )
        found[f"microscaled_fp8 codes {kind}"] = partial(_tap_codes, setting, dtype)
        found[f"ladder_mix {kind}"] = partial(_mix, setting, dtype)
        found[f"frozen_linear int8 {kind}"] = partial(
            _frozen, setting, dtype, pack=lambda w: int8_quantize(w, 0), dense=_int8_dense
        )
        found[f"frozen_linear nf4 {kind}"] = partial(
            _frozen, setting, dtype, pack=nf4_quantize, dense=_nf4_dense, problem=problem
        )
        found[f"gated_product {kind}"] = partial(_gated, setting, dtype)
        for softcap in (None, 30.0):
            found[f"cross_entropy {kind} softcap={softcap}"] = partial(
                _cross_entropy, setting, dtype, softcap
            )
    found["nf4 codes"] = partial(_nf4_codes, setting, problem)
    found["int8 codes"] = partial(_int8_codes, setting)
    found["uniform_int4"] = partial(_uniform_int4, setting)
    return found
