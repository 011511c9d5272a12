"""`optim="galore_adamw"`: a checkpoint that transformers' Trainer writes and cannot read.

GaLore's projector is a Python object in the optimizer's state, and the Trainer loads optimizer.pt
with `weights_only=True`.
"""

from __future__ import annotations

from pickle import UnpicklingError

from common import folder, require, trainer, verdict

GALORE = {
    "optim": "galore_adamw",
    "optim_target_modules": ["q_proj"],
    "optim_args": "rank=4,update_proj_gap=2",
}


def main() -> None:
    require("galore_torch", distribution="galore-torch")
    run = folder()
    trainer(run, **GALORE).train()
    seen = "resumed from checkpoint-3"
    still_there = False
    try:
        trainer(run, **GALORE).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    except UnpicklingError as error:
        still_there = True
        seen = f"resuming raises UnpicklingError: {str(error).splitlines()[0][:80]}"
    verdict(still_there, packages=["transformers", "galore-torch"], seen=seen)


if __name__ == "__main__":
    main()
