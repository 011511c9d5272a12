"""transformers' `BitsAndBytesConfig` as a strategy: `memrt.load(..., quantization_config=...)`.

`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
bnb_4bit_compute_dtype=dtype)`, QLoRA's, is `nf4`: the same layers, codes and scales. Where it says
something that memrt does otherwise it is refused, never ignored: FP4, scales in 32 bits, another
dtype of the products than the model's, and LLM.int8(), which quantises activations too.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from memrt import registry
from memrt.spellings import KEYS, REFUSED_KEYS
from memrt.translation import join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memrt.strategy import Strategy

__all__ = ["REFUSED_SETTINGS", "with_quantization"]

logger = logging.getLogger(__name__)

_NAME = "quantization_config"
_STRATEGY = "nf4"

REFUSED_SETTINGS = {
    "load_in_8bit": "LLM.int8() quantises activations too, and memrt's int8 the weights alone; "
    "leave quantization_config out and give strategies=['int8']",
    "llm_int8_skip_modules": "leave it out and give strategies=[\"nf4(keep=('name',))\"], with the "
    "names of the modules that stay",
    "llm_int8_enable_fp32_cpu_offload": REFUSED_KEYS["stream_layers"],
}
"""Settings that must stay as they are by default, and what to do instead."""


def with_quantization(
    listed: Sequence[Strategy], config: Any, *, dtype: torch.dtype
) -> list[Strategy]:
    """The strategies with what a `quantization_config` asks for; `dtype` is the model's."""
    if config is None:
        return list(listed)
    _check(config, dtype)
    found = registry.parse_all(join(listed, [registry.parse(_STRATEGY)], subject=_NAME))
    logger.warning(
        "%s is run as strategies=%s; give a Trainer or memrt.prepare %r too",
        _NAME,
        [str(strategy) for strategy in found],
        _STRATEGY,
    )
    return found


def _check(config: Any, dtype: torch.dtype) -> None:
    from transformers import BitsAndBytesConfig

    if not isinstance(config, BitsAndBytesConfig):
        raise ValueError(
            f"{_NAME} is a {type(config).__name__}: must be a BitsAndBytesConfig with "
            "load_in_4bit=True; memrt has strategies=['nf4'] and ['int8']"
        )
    for name, why in REFUSED_SETTINGS.items():
        value = getattr(config, name)
        if value:
            raise ValueError(f"{_NAME}: {name}={value!r}: {why}")
    if not config.load_in_4bit:
        raise ValueError(f"{_NAME}: load_in_4bit=False: has no effect; set it, or leave it out")
    for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        KEYS[name].value(f"{_NAME}: {name}", getattr(config, name))
    if config.bnb_4bit_quant_storage != torch.uint8:
        why = REFUSED_KEYS["bnb_4bit_quant_storage"]
        raise ValueError(f"{_NAME}: bnb_4bit_quant_storage={config.bnb_4bit_quant_storage}: {why}")
    computes = config.bnb_4bit_compute_dtype
    if computes != dtype:
        raise ValueError(
            f"{_NAME}: bnb_4bit_compute_dtype={computes}: memrt computes in the dtype of a layer's "
            f"input, and the model is loaded in {dtype}; set it to {dtype}, or load with "
            f"dtype={computes}"
        )
