"""QLoRA as people run it: PEFT over bitsandbytes' 4-bit layers under transformers' Trainer.

The model is loaded as memrt's stacks load it; then each layer's weight is made dense, given to
bitsandbytes' `Linear4bit` (NF4, double quantisation, computing in bf16) and dropped, so that both
train the same weights and no more than one of them is dense at a time. From there on it is PEFT's
own way: `prepare_model_for_kbit_training` (which keeps embeddings, norms and head in fp32),
`get_peft_model` with rank 16 on all linear layers, gradient checkpointing, and the Trainer with
bf16 autocast and its default AdamW.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import nn

import memrt
from benchmarks.gpu.common import Setting, empty
from benchmarks.gpu.constants import Driver
from benchmarks.gpu.memory import allocator_peaks, context_bytes, driver_peaks
from benchmarks.gpu.workloads import DTYPE, SETTINGS, Model
from benchmarks.shapes import llama_config
from benchmarks.trainer_steps import random_examples, train
from memrt.packed_weights import packed_layers
from memrt.profiling.monitor import Monitor

__all__ = ["four_bit", "measured"]

WARM_UP = 2
TIMED = 4
RANK, ALPHA = 16, 32
CHECKPOINTING = {"use_reentrant": False}


def four_bit(model: nn.Module, device: torch.device) -> nn.Module:
    """Put bitsandbytes' layers in the place of memrt's packed ones, one at a time."""
    import bitsandbytes

    for name, layer in packed_layers(model):
        rows, columns = layer.dense_shape
        has_bias = layer.bias is not None
        made = bitsandbytes.nn.Linear4bit(
            columns,
            rows,
            bias=has_bias,
            compute_dtype=layer.dense_dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        made.weight = bitsandbytes.nn.Params4bit(
            layer.dense(layer.weight.detach()),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=made,
        ).to(device)
        if has_bias:
            made.bias = layer.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made)
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT asks
    return model


def _model(setting: Setting, model: Model) -> nn.Module:
    import peft

    config = llama_config(model.size)
    base = memrt.load(config, ["nf4"], dtype=DTYPE, device=setting.device, seed=0)
    base.config.use_cache = False
    prepared = peft.prepare_model_for_kbit_training(
        four_bit(base, setting.device),
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs=CHECKPOINTING,
    )
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    found: nn.Module = peft.get_peft_model(prepared, lora)
    return found


def measured(setting: Setting, model: Model, *, driver: Driver) -> dict[str, Any]:
    """Tokens a second and peaks of the Trainer's steps."""
    empty(setting.device)
    context = context_bytes(setting, driver)
    steps = WARM_UP + (1 if setting.tiny else TIMED)
    examples = random_examples(
        llama_config(model.size).vocab_size,
        count=model.shape.batch_size * steps,
        length=model.shape.sequence_length,
        seed=0,
    )
    with Monitor(device=setting.device) as monitor:
        with monitor.phase("load"):
            built = _model(setting, model)
            empty(setting.device)
        trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
        with monitor.phase("train"):
            run = train(
                "transformers",
                built,
                examples,
                device=setting.device,
                batch_size=model.shape.batch_size,
                steps=steps,
                warm_up=WARM_UP,
                arguments={
                    "bf16": setting.is_cuda,
                    "gradient_checkpointing": True,
                    "gradient_checkpointing_kwargs": CHECKPOINTING,
                    "weight_decay": 0.0,
                    "max_grad_norm": SETTINGS.max_grad_norm,
                },
            )
    report = monitor.report()
    return {
        "size": model.size,
        "num_trained": trained,
        "step_seconds": run.step_seconds,
        "tokens_per_second": model.shape.tokens_per_step / median(run.step_seconds),
        "loss": run.training_loss,
        "allocator_phases": allocator_peaks(report),
        "driver": {**driver_peaks(report), "context_bytes": context},
    }
