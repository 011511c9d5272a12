"""`auto_find_batch_size=True`: after an out-of-memory error the run starts at step 0 again, with
the weights that it had changed, and with a smaller effective batch.
"""

from __future__ import annotations

from typing import Any

import transformers
from common import difference, folder, tiny_llama, trainer, verdict


class OutOfMemoryOnce(transformers.TrainerCallback):
    """Runs out of memory at the third step of the first attempt, and looks at every start."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, float, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        moved = difference(others["model"], tiny_llama())
        batch = state.train_batch_size * args.gradient_accumulation_steps
        self.starts.append((state.global_step, moved, batch))

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if len(self.starts) == 1 and state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")


def main() -> None:
    run = trainer(folder(), auto_find_batch_size=True, per_device_train_batch_size=8, save_steps=9)
    seen = OutOfMemoryOnce()
    run.add_callback(seen)
    run.train()
    (_, _, before), (step, moved, after) = seen.starts
    verdict(
        moved > 0 or before != after,
        packages=["transformers", "accelerate"],
        seen=f"the second attempt starts at step {step} with weights that are {moved:.1e} away "
        f"from the initial ones, and with {after} examples a step instead of {before}",
    )


if __name__ == "__main__":
    main()
