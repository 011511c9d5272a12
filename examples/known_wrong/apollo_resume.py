"""`optim="apollo_adamw"`: a checkpoint that transformers' Trainer writes and cannot read."""

from __future__ import annotations

from pickle import UnpicklingError

from common import folder, require, trainer, verdict

APOLLO = {
    "optim": "apollo_adamw",
    "optim_target_modules": ["q_proj"],
    "optim_args": "rank=4,update_proj_gap=2,proj=random,scale_type=channel,scale=1.0",
}


def main() -> None:
    require("apollo_torch", distribution="apollo-torch")
    run = folder()
    trainer(run, **APOLLO).train()
    still_there, seen = False, "resumed from checkpoint-3"
    try:
        trainer(run, **APOLLO).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    except UnpicklingError as error:
        still_there = True
        seen = f"resuming raises UnpicklingError: {str(error).splitlines()[0][:80]}"
    verdict(still_there, packages=["transformers", "apollo-torch"], seen=seen)


if __name__ == "__main__":
    main()
