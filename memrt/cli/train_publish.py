"""What a finished `memrt train` leaves: a plain model, or what trained beside one.

Adapters stay adapters where their model lies in a folder or on the Hub: to fold them into 4-bit
weights would make the whole model dense, many times what the run itself needed. Beside random
weights, which nobody else has, they are folded. A side network always stands alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from memrt.checkpoint import staged

if TYPE_CHECKING:
    from memrt.trainer import Trainer

__all__ = ["write_trained"]


def write_trained(trainer: Trainer, folder: Path, *, base: str | None) -> str:
    """Write what was trained into a new folder; returns what that is, for people.

    `base` names the model that training began with; None for random weights.
    """
    from memrt.export import export_run

    attached = [] if trainer.session is None else trainer.session.attachments
    parts = [attachment for attachment in attached if attachment.apart != "no"]
    alone = any(part.apart == "must" for part in parts)
    if not parts or (base is None and not alone):
        export_run(trainer, folder)
        return "model"
    with staged(folder) as made:
        for part in parts:
            part.save_apart(made)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(made)
    return "side network" if alone else f"adapters of {base}"
