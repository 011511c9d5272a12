"""`optim="galore_adamw_layerwise"`: a resume that begins anew, a gradient norm of 0, no clipping.

The Trainer saves a dummy optimizer in the place of the real ones, which live in hooks on the
gradients; when it wants to clip, the gradients are gone.
"""

from __future__ import annotations

from common import difference, folder, gradient_norms, require, trainer, verdict

LAYERWISE = {
    "optim": "galore_adamw_layerwise",
    "optim_target_modules": ["q_proj"],
    "optim_args": "rank=4,update_proj_gap=2",
}


def main() -> None:
    require("galore_torch", distribution="galore-torch")
    run = folder()
    whole = trainer(run, **LAYERWISE)
    whole.train()
    num_bytes = (run / "checkpoint-3/optimizer.pt").stat().st_size
    resumed = trainer(run, **LAYERWISE)
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    apart = difference(whole.model, resumed.model)
    norms = gradient_norms(whole)
    verdict(
        apart > 0 or not any(norms),
        packages=["transformers", "galore-torch"],
        seen=f"optimizer.pt has {num_bytes:,} bytes, the resumed run's weights differ by "
        f"{apart:.1e} from the uninterrupted run's, grad_norm was logged as {norms}",
    )


if __name__ == "__main__":
    main()
