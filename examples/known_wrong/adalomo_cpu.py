"""`optim="adalomo"` on a machine without CUDA: the optimizer calls `.cuda()`."""

from __future__ import annotations

import torch
from common import folder, require, trainer, verdict


def main() -> None:
    require("lomo_optim", distribution="lomo-optim")
    if torch.cuda.is_available():
        print("this machine has CUDA; the defect shows where there is none")
        raise SystemExit(2)
    still_there, seen = False, "two steps ran"
    try:
        trainer(folder(), optim="adalomo", max_steps=2, save_steps=9).train()
    except (AssertionError, RuntimeError) as error:
        still_there, seen = True, f"the run raises {type(error).__name__}: {error}"
    verdict(still_there, packages=["transformers", "lomo-optim"], seen=seen)


if __name__ == "__main__":
    main()
