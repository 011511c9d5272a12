"""Gradients of every adapter over packed weights, against the same weights kept dense.

Two peers trained with wrong gradients under loss curves that looked right, so no loss is compared
here but the gradient of every adapter of every layer, on four layers of 70B's widths. B of LoRA is
not zero, so that A has a gradient too. The dense reference has the rounded weights and nothing else
packed, and the same stack otherwise (in bf16 with checkpointing and fused loss), so that both do
the same products: what may differ is the order of sums. In fp32 that is within 1e-4; in bf16 within
half of what bf16 itself is off, which is the dense model's distance from its own copy in fp32.

The control: one layer's weight four times too large, as a wrong scale makes it. It must be found.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import memrt
from benchmarks.gpu.common import Setting, empty
from benchmarks.gpu.workloads import ADAPTERS
from benchmarks.shapes import llama_config
from memrt.packed_weights import PackedLinear, packed_layers, unpack
from memrt.random_batches import Shape, random_batches
from memrt.runner import model_loss

__all__ = ["check"]

NUM_LAYERS = 4
VOCABULARY = 8192
TOKENS = 512
FLOAT32_ERROR = 1e-4
"""Of sums over 28,672 products in another order."""
SHARE_OF_ROUNDING = 0.5
WRONG_SCALE = 4.0
WRONG_LAYER = "layers.2.mlp.down_proj"


def _config(setting: Setting) -> Any:
    config = llama_config("tiny" if setting.tiny else "70B")
    config.num_hidden_layers = NUM_LAYERS
    config.vocab_size = min(config.vocab_size, VOCABULARY)
    return config


def _load(setting: Setting, config: Any, packed: str, dtype: torch.dtype) -> nn.Module:
    model = memrt.load(config, [packed], dtype=dtype, device=setting.device, seed=0)
    model.config.use_cache = False
    return model.train()


def _dense(model: nn.Module) -> nn.Module:
    """Every packed layer with its rounded weight, resident."""
    for _, layer in packed_layers(model):
        unpack(layer)
    return model


def _scale_wrongly(model: nn.Module) -> None:
    """One layer's weight as codes under a scale that is too large."""
    ((_, layer),) = [each for each in packed_layers(model) if WRONG_LAYER in each[0]]
    assert isinstance(layer, PackedLinear)
    wrong = layer.dense(layer.weight.detach()) * WRONG_SCALE
    layer.weight.data = layer.packed_format.pack(wrong, layer.output_axis)


def _gradients(
    model: nn.Module, stack: list[str], batch: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and adapter gradients of one micro-batch, in fp32 on the host."""
    torch.manual_seed(1)
    session = memrt.prepare(model, stack)
    generator = torch.Generator().manual_seed(2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_(noise.to(parameter.dtype))
    session.begin_step()
    loss = session.train_micro_batch(lambda: model_loss(model, batch), last=True)
    found = {name: p.grad.float().cpu() for name, p in trained.items() if p.grad is not None}
    assert found.keys() == trained.keys(), f"no gradient: {sorted(trained.keys() - found.keys())}"
    return float(loss), found


def _errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {n: float((found[n] - g).norm() / g.norm().clamp(min=1e-30)) for n, g in wanted.items()}


def _wrong(errors: dict[str, float], allowed: dict[str, float]) -> list[str]:
    """Adapters that are off; written so that NaN, which compares as false, is."""
    return [name for name, error in errors.items() if not error <= allowed[name]]


def check(setting: Setting, *, packed: str, dtype: torch.dtype) -> dict[str, Any]:
    """One row: errors by layer, and whether the control was found."""
    config = _config(setting)
    shape = Shape(sequence_length=32 if setting.tiny else TOKENS)
    window = random_batches(config.vocab_size, shape)
    batch = {name: value.to(setting.device) for name, value in window[0].items()}
    beside = [] if dtype == torch.float32 else ["activation_checkpoint", "fused_loss"]
    stack = [packed, ADAPTERS, *beside]

    def of(model: nn.Module, names: list[str]) -> tuple[float, dict[str, Tensor]]:
        result = _gradients(model, names, batch)
        del model
        empty(setting.device)
        return result

    loss, ours = of(_load(setting, config, packed, dtype), stack)
    resident = _dense(_load(setting, config, packed, dtype))
    allowed = dict.fromkeys(ours, FLOAT32_ERROR)
    wide = None if dtype == torch.float32 else copy.deepcopy(resident).float()
    reference_loss, reference = of(resident, stack[1:])
    if wide is not None:
        rounding = _errors(reference, of(wide, [ADAPTERS])[1])
        slack = torch.finfo(dtype).eps
        allowed = {name: SHARE_OF_ROUNDING * e + slack for name, e in rounding.items()}
    model = _load(setting, config, packed, dtype)
    _scale_wrongly(model)
    control = of(model, stack)[1]
    errors = _errors(ours, reference)
    wrong, found = _wrong(errors, allowed), _wrong(_errors(control, reference), allowed)
    reasons = [f"{len(wrong)} adapters are off, {wrong[0]} first"] if wrong else []
    reasons += [] if found else ["the control, a wrong scale, was not found"]
    return {
        "status": "failed" if reasons else "passed",
        "reason": "; ".join(reasons) or None,
        "stack": "+".join(stack),
        "num_adapters": len(errors),
        "largest_error": max(errors.values()),
        "largest_allowed": max(allowed.values()),
        "errors": errors,
        "loss": loss,
        "reference_loss": reference_loss,
        "control_found": len(found),
    }
