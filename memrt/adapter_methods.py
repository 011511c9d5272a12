"""What PEFT's methods need: the layers' dense weights, or PEFT's own wrapper while they train.

The strategy `peft` puts layers into a model and leaves PEFT's wrapper out, as transformers does.
What the wrapper did between steps, or in the model's forward, would silently be left undone.
"""

from __future__ import annotations

from typing import Any

__all__ = ["needs_wrapper", "reads_base_weights"]

# Methods that add something to a layer's output and look at its weight only to fold it in. Each
# was trained over NF4 here; the others multiply the weight by their own, or start from its values.
_BESIDE_THE_WEIGHT = frozenset({"LORA", "IA3", "ADALORA"})
_LORA_READS = (
    "use_dora",
    "use_qalora",
    "corda_config",
    "eva_config",
    "kasa_config",
    "loftq_config",
    "lora_ga_config",
)
_LORA_STARTS = (True, False, "gaussian", "orthogonal")

_METHODS = {
    "ADALORA": "moves ranks between the layers after each step and adds to the loss",
    "POLY": "tells the layers the task of every row",
    "XLORA": "mixes adapters that were trained before",
}
_LORA_OPTIONS = {
    "alora_invocation_tokens": "looks for the invocation tokens in the input",
    "arrow_config": "routes between adapters that were trained before",
    "monteclora_config": "adds to the loss",
    "layer_replication": "changes the model's own layers",
}
_STARTED_LATER = {"eva": "is started on data by initialize_lora_eva_weights"}


def needs_wrapper(config: Any) -> str | None:
    """Which part of a configuration needs PEFT's own wrapper, and why; None for the most."""
    kind = str(config.peft_type.value)
    if kind in _METHODS:
        return f"PEFT's wrapper of {kind} {_METHODS[kind]}"
    if kind != "LORA":
        return None
    for option, reason in _LORA_OPTIONS.items():
        value = getattr(config, option, None)
        if value:
            return f"{option}={value!r}: PEFT's wrapper {reason}"
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() in _STARTED_LATER:
        return f"init_lora_weights={start!r}: LoRA {_STARTED_LATER[start.lower()]}"
    return None


def reads_base_weights(config: Any) -> str | None:
    """The method, or the part of it, that needs the dense weights; None when it does not."""
    kind = str(config.peft_type.value)
    if kind not in _BESIDE_THE_WEIGHT:
        return f"PEFT's {kind}"
    if kind != "LORA":
        return None
    used = [name for name in _LORA_READS if getattr(config, name, None)]
    if used:
        return f"{used[0]}={getattr(config, used[0])!r}"
    start = config.init_lora_weights
    return None if start in _LORA_STARTS else f"init_lora_weights={start!r}"
