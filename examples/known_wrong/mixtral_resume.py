"""transformers' Trainer resumes a Mixtral with the experts that it began with.

Since transformers 5 a model's experts are one fused weight, and checkpoints hold them one by one.
The Trainer copies by name, without strictness: no name fits, and nothing is said.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from common import folder, trainer, verdict


def tiny_mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
    )
    return transformers.MixtralForCausalLM(config)


class Looks(transformers.TrainerCallback):
    """At the resumed experts, before the first step."""

    def __init__(self, **others: Any) -> None:
        self.others = {name: model.state_dict() for name, model in others.items()}
        self.apart = dict.fromkeys(others, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for name, tensor in given["model"].state_dict().items():
            for key, other in self.others.items():
                if "experts" in name:
                    gap = float((tensor - other[name]).abs().max())
                    self.apart[key] = max(self.apart[key], gap)


def main() -> None:
    run = folder()
    base = folder()
    tiny_mixtral().save_pretrained(base)
    load = transformers.MixtralForCausalLM.from_pretrained
    trainer(run, model=load(base)).train()
    looks = Looks(saved=load(run / "checkpoint-3"), begun=load(base))
    resumed = trainer(run, model=load(base))
    resumed.add_callback(looks)
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    verdict(
        looks.apart["saved"] > 0,
        packages=["transformers"],
        seen=f"the resumed experts differ by {looks.apart['saved']:.1e} from those of the "
        f"checkpoint and by {looks.apart['begun']:.1e} from those that the run began with",
    )


if __name__ == "__main__":
    main()
