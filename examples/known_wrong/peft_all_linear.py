"""PEFT's `target_modules="all-linear"` leaves dense layers of some mixtures without adapters.

The experts' projections, which transformers 5 fuses, are known by the ends of their names. A dense
MLP and a shared expert have layers of the same names, and are taken for experts.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from common import verdict
from peft.tuners.tuners_utils import BaseTunerLayer


def tiny_deepseek() -> Any:
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_deepseek(), config)
    adapted = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    left = [name for name in linear if not f"{name}.".startswith(adapted) and "lm_head" not in name]
    verdict(
        bool(left),
        packages=["peft", "transformers"],
        seen=f"{len(left)} linear layers have no adapter, such as {left[0] if left else 'none'}",
    )


if __name__ == "__main__":
    main()
