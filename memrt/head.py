"""The head door: a strategy that owns head and loss gets the head's input instead of logits.

In training, and only when labels are given, the model's forward runs its own body (and the
transform that some families have before the head), then calls the strategy. Otherwise the model is
as ever, so evaluation, prediction and generation see logits.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from memrt.surgery import subclass_of

if TYPE_CHECKING:
    from memrt.session import Session
    from memrt.strategy import Attachment
    from memrt.structure import Facts

__all__ = ["check_head", "install_head"]

# arguments of a model's forward that concern the logits which are not made here
_HEAD_ONLY_ARGUMENTS = ("logits_to_keep", "return_dict", "vocab_size", "ignore_index")


def check_head(facts: Facts) -> None:
    """Refuse models whose head cannot be taken over: `ValueError` with the reason."""
    structure = facts.structure
    kind = type(facts.model).__name__
    if structure.head is None or structure.body is None:
        raise ValueError(
            f"{kind} has no language-model head over a body that could be found; use it on a "
            "causal or masked language model"
        )
    if not isinstance(facts.model.get_submodule(structure.head), nn.Linear):
        raise ValueError(f"the head {structure.head!r} of {kind} is not a linear layer")
    if "forward" in vars(facts.model):
        raise ValueError(
            f"{kind}.forward was replaced on this instance (TRL's SFTTrainer does it to fuse its "
            "own head); drop one of the two"
        )
    if getattr(facts.config, "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits=True adds a router loss after the head; set it to False"
        )
    if facts.settings.label_smoothing:
        raise ValueError(
            f"label_smoothing_factor={facts.settings.label_smoothing} needs logits; set it to 0"
        )
    if facts.settings.custom_loss:
        raise ValueError("compute_loss_func needs logits; leave it out")


def install_head(run: Session, owner: Attachment) -> None:
    """Recast the model so that training with labels goes through `owner.loss`."""
    structure = run.facts.structure
    assert structure.body is not None
    body = run.model.get_submodule(structure.body)
    transform_name = structure.family.head_transform
    transform = run.model.get_submodule(transform_name) if transform_name else None

    class HeadModel:
        training: bool

        @wraps(type(run.model).forward)  # trainers and generation read the signature
        def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            if labels is None or not self.training:
                return super().forward(*args, labels=labels, **kwargs)  # type: ignore[misc]
            num_items = kwargs.pop("num_items_in_batch", None)
            shifted = kwargs.pop("shift_labels", None)
            for name in _HEAD_ONLY_ARGUMENTS:
                kwargs.pop(name, None)
            hidden: Tensor = body(*args, **kwargs)[0]
            if transform is not None:
                hidden = transform(hidden)
            if structure.family.shifts_labels and shifted is None:
                shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
            loss = owner.loss(hidden, labels if shifted is None else shifted, num_items)
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(loss=loss)

    run.recast("", subclass_of(type(run.model), HeadModel))
