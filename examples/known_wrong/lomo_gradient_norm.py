"""`optim="lomo"`: the Trainer logs a gradient norm of 0 and clips nothing, though it was told to.

LOMO updates while backward runs; the gradients are gone when the Trainer clips.
"""

from __future__ import annotations

from common import difference, folder, gradient_norms, require, tiny_llama, trainer, verdict


def main() -> None:
    require("lomo_optim", distribution="lomo-optim")
    runs = {}
    for max_norm in (1e-6, 1.0):
        run = trainer(folder(), optim="lomo", max_grad_norm=max_norm, max_steps=2, save_steps=9)
        run.train()
        runs[max_norm] = run
    norms = gradient_norms(runs[1.0])
    apart = difference(runs[1e-6].model, runs[1.0].model)
    moved = difference(runs[1e-6].model, tiny_llama())
    verdict(
        not any(norms),
        packages=["transformers", "lomo-optim"],
        seen=f"grad_norm was logged as {norms}; max_grad_norm=1e-6 moved the weights by "
        f"{moved:.1e}, and they differ by {apart:.1e} from those of max_grad_norm=1",
    )


if __name__ == "__main__":
    main()
