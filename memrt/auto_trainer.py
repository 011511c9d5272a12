"""`memory_budget`: the strategies of a Trainer, chosen for its model, arguments and data.

What is planned is the largest micro-batch that a look at the training set finds: the longest of its
first `MAX_ROWS` examples, collated as the Trainer collates them.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from memrt import registry
from memrt.auto import Choice, choose
from memrt.compose import conflicts
from memrt.model_source import TASKS, class_names
from memrt.planning import facts_of
from memrt.runner import Batch, model_loss
from memrt.structure import Facts, discover

if TYPE_CHECKING:
    from torch import Tensor, nn

    from memrt.strategy import Strategy

__all__ = [
    "MAX_ROWS",
    "autocast_loss",
    "choice_for_trainer",
    "require_fitting",
    "strategies_within",
]

MAX_ROWS = 10_000

logger = logging.getLogger(__name__)


def choice_for_trainer(trainer: Any, named: Sequence[Strategy], budget: str) -> Choice:
    """The stack for a transformers Trainer; `ValueError` with what to change where none fits."""
    args, model = trainer.args, trainer.model
    if not hasattr(model, "config") or not hasattr(model.config, "model_type"):
        raise ValueError(
            f"memory_budget={budget!r} needs a transformers model, not {type(model).__name__}; "
            "choose with memrt.choose(build, window=..., budget=...) and pass strategies"
        )
    _require_as_configured(model, budget)
    batch = _largest_batch(trainer)
    ids = batch.get("input_ids")
    width: dict[str, Any] = {} if ids is None else {"sequence_length": ids.shape[1]}
    mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return require_fitting(
        choose(
            model.config,
            named,
            budget=budget,
            batch_size=len(next(iter(batch.values()))),
            dtype=next(model.parameters()).dtype,
            max_grad_norm=args.max_grad_norm or 0.0,
            window=[batch] * args.gradient_accumulation_steps,
            loss_of=autocast_loss(mixed),
            task=_task_of(model),
            on_plan=_refusing(trainer),
            settings=trainer._run_settings(),
            **width,
        )
    )


def _require_as_configured(model: Any, budget: str) -> None:
    """Refuse a model that was frozen in part or was changed: its config says nothing of it."""
    dtype = next(model.parameters()).dtype
    planned = dict(facts_of(model.config, dtype=dtype, task=_task_of(model)).parameters())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    other = sorted(planned.keys() ^ trained)
    if other:
        how = "does not train" if other[0] in planned else "is added"
        raise ValueError(
            f"memory_budget={budget!r} plans {type(model).__name__} as its config makes it, and in "
            f"this one {other[0]!r} {how}; choose with memrt.choose(build, window=..., "
            "budget=...), where build makes it as it is, and pass strategies"
        )


def _task_of(model: Any) -> str | None:
    """The task of a model's class, which its config need not name; None for a class of its own."""
    kind = type(model).__name__
    return next((task for task in TASKS if kind in class_names(model.config, task)), None)


def strategies_within(trainer: Any, named: Sequence[Strategy], budget: str) -> list[Strategy]:
    """The strategies of `choice_for_trainer`, which stays as `trainer.memory_choice`."""
    choice = choice_for_trainer(trainer, named, budget)
    trainer.memory_choice = choice
    logger.warning("memory_budget=%s: %s", budget, choice.explain())
    return registry.parse_all(choice.strategies)


def _refusing(trainer: Any) -> Callable[[str], None]:
    """Refuses, before it is planned, a stack that this Trainer and its model refuse.

    A Trainer may checkpoint activations or fuse the head itself (TRL's does), which no config says.
    """
    model = trainer._bare_model()
    facts = Facts(model=model, structure=discover(model), settings=trainer._run_settings())

    def check(label: str) -> None:
        problems = conflicts(_stack_of(label), facts)
        if problems:
            raise ValueError("; ".join(problems))

    return check


def _stack_of(label: str) -> list[Strategy]:
    """The strategies that the label of a plan joins with a plus."""
    if label == "none":
        return []
    rest, found = ast.parse(label, mode="eval").body, []
    while isinstance(rest, ast.BinOp):
        found.append(rest.right)
        rest = rest.left
    return registry.parse_all(ast.unparse(each) for each in [*found, rest])


def require_fitting(choice: Choice) -> Choice:
    """The choice, if it fits; `ValueError` with all that was tried otherwise."""
    if not choice.fits:
        assert choice.plan.gpu is not None
        raise ValueError(
            f"memory_budget={choice.plan.gpu.text!r}: no stack of strategies fits.\n"
            + choice.explain()
        )
    return choice


def autocast_loss(mixed: torch.dtype | None) -> Callable[[nn.Module, Batch], Tensor]:
    """The model's own loss, under autocast where the run trains in mixed precision."""

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        with nullcontext() if mixed is None else torch.autocast("cpu", dtype=mixed):
            return model_loss(model, batch)

    return loss_of


def _largest_batch(trainer: Any) -> Batch:
    """The longest rows of the training set, collated; no generator and no loader is advanced."""
    rows = trainer.train_dataset
    if rows is None:
        raise ValueError("memory_budget needs a train_dataset, whose largest batch is planned")
    collate = trainer._get_collator_with_removed_columns(
        trainer.data_collator, description="training"
    )
    with torch.random.fork_rng(devices=[]):
        seen = list(islice(iter(rows), MAX_ROWS))
        longest = sorted(seen, key=_length, reverse=True)[: trainer.args.train_batch_size]
        batch: Batch = collate(longest)
    if not all(isinstance(value, torch.Tensor) for value in batch.values()):
        raise ValueError("memory_budget needs batches of tensors; pass strategies instead")
    return {name: value.cpu() for name, value in batch.items()}


def _length(row: Any) -> int:
    ids = row.get("input_ids", ()) if hasattr(row, "get") else ()
    return len(ids)
