"""`memrt.prepare`: strategies for a plain training loop over any `nn.Module`.

run = memrt.prepare(model, ["galore(rank=128)", "activation_checkpoint"], lr=1e-3)
for window in batches:                      # the micro-batches of one optimizer step
    for batch in window:
        with run.micro_batch(last=batch is window[-1]):
            run.backward(loss_of(model, batch) / len(window))
    run.step()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from memrt import registry
from memrt.session import Session
from memrt.structure import RunSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from memrt.profiling.ledger import Ledger
    from memrt.strategy import Strategy

__all__ = ["prepare", "refuse_untrained", "refuse_unused_rounding"]

_REMEDY = (
    "leave optimizer out and pass lr, betas, eps, weight_decay, or make it over the model's "
    "parameters after memrt.prepare and call run.adopt_optimizer with it"
)


def prepare(
    model: nn.Module,
    strategies: Sequence[str | Strategy | Mapping[str, Any]] = (),
    *,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    stochastic_rounding: bool | None = None,
    max_grad_norm: float = 0.0,
    accumulation_steps: int = 0,
    seed: int = 42,
    optimizer: torch.optim.Optimizer | None = None,
    ledger: Ledger | None = None,
    probe_batches: Callable[[int], Iterable[Any]] | None = None,
) -> Session:
    """Attach strategies to any `nn.Module` for a plain loop, with AdamW as the update rule.

    AdamW's settings are torch's, but for a `weight_decay` of 0: `lr=1e-3, betas=(0.9, 0.999),
    eps=1e-8`. `accumulation_steps=0` says that the loop decides window by window. `optimizer`
    replaces the built one: it is refused together with settings of AdamW, which it would not heed,
    when a strategy brings a part of the optimizer, and when one adds parameters that train, which
    an optimizer of before cannot hold. Where a strategy brings a part (`lisa` and `badam`: to bf16
    weights), bf16 is rounded stochastically, or to the nearest with `stochastic_rounding=False`.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r}: must be an nn.Module; memrt.load makes one")
    _check_objects(stochastic_rounding, optimizer, probe_batches)
    given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    given["stochastic_rounding"] = stochastic_rounding
    _refuse_unheeded(given, optimizer)
    decay = 0.0 if weight_decay is None else weight_decay
    settings = RunSettings(
        learning_rate=1e-3 if lr is None else lr,
        betas=(0.9, 0.999) if betas is None else betas,
        epsilon=1e-8 if eps is None else eps,
        weight_decay=decay,
        max_grad_norm=max_grad_norm,
        accumulation_steps=accumulation_steps,
        optimizer="adamw" if optimizer is None else type(optimizer).__name__,
        seed=seed,
        stochastic_rounding=stochastic_rounding is not False,
        **_processes(model),
    )
    before = set(model.parameters())
    run = Session(
        model,
        registry.parse_all(strategies),
        settings=settings,
        ledger=ledger,
        probe_batches=probe_batches,
    )
    try:
        if stochastic_rounding is not None:
            refuse_unused_rounding(run, stochastic_rounding)
        run.adopt_optimizer(_optimizer(run, optimizer, decay, before))
    except BaseException:
        run.detach()
        raise
    return run


def _processes(model: nn.Module) -> dict[str, Any]:
    """Settings of who copies the model, sums its gradients or gives each process a part of it."""
    copies = any(isinstance(part, nn.DataParallel) for part in model.modules())
    return {"data_parallel": copies, "sharded": _sharing(model)}


def _sharing(model: nn.Module) -> str | None:
    """Who sums gradients over processes, or gives each a part of the parameters; None: nobody.

    With several processes it is taken for granted, for DDP may wrap the model later.
    """
    parts = tuple(model.modules())
    kinds = {type(each).__name__ for each in (*parts, *model.parameters())}
    if kinds & {"FullyShardedDataParallel", "DTensor"}:  # by name: importing them takes a second
        return "fsdp"
    wrapped = any(isinstance(part, nn.parallel.DistributedDataParallel) for part in parts)
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return "distributed data parallel" if wrapped or several else None


def _refuse_unheeded(given: Mapping[str, Any], optimizer: torch.optim.Optimizer | None) -> None:
    """Settings of AdamW beside another optimizer."""
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    if optimizer is not None and named:
        raise ValueError(
            f"{', '.join(named)} would have no effect on optimizer={type(optimizer).__name__}; set "
            "them in that optimizer, or leave it out"
        )


def refuse_unused_rounding(run: Session, stochastic_rounding: bool) -> None:
    """Refuse a wish about rounding where torch's AdamW steps, and where nothing is rounded."""
    why = None
    if not run.rules():
        why = "no strategy brings a part of the optimizer, and torch's AdamW rounds to the nearest"
    elif not any(p.dtype is torch.bfloat16 and p.requires_grad for p in run.model.parameters()):
        why = "no parameter that trains is bf16"
    if why is not None:
        raise ValueError(
            f"stochastic_rounding={stochastic_rounding} has no effect: {why}; leave it out"
        )


def _check_objects(stochastic_rounding: Any, optimizer: Any, probe_batches: Any) -> None:
    """What would be heeded in another way, or fail in the middle of a run."""
    if stochastic_rounding is not None and not isinstance(stochastic_rounding, bool):
        raise ValueError(f"stochastic_rounding={stochastic_rounding!r}: must be True or False")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer={optimizer!r}: must be a torch.optim.Optimizer over the model's "
            "parameters; leave it out for AdamW"
        )
    if probe_batches is not None and not callable(probe_batches):
        raise ValueError(
            f"probe_batches={type(probe_batches).__name__}: must be a function that is given a "
            "number and returns as many batches"
        )


def _optimizer(
    run: Session,
    given: torch.optim.Optimizer | None,
    weight_decay: float,
    before: Collection[nn.Parameter],
) -> torch.optim.Optimizer:
    if given is None:
        named = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
        return run.build_optimizer([{"params": named, "weight_decay": weight_decay}])
    if run.rules():
        raise ValueError(
            f"optimizer={type(given).__name__} cannot be combined with "
            f"{', '.join(a.name for a in run.attachments if a.rules())}, which bring parts of the "
            "optimizer; leave optimizer out and pass lr, betas, eps, weight_decay"
        )
    refuse_untrained(run, given, before=before, remedy=_REMEDY)
    return given


def refuse_untrained(
    run: Session,
    optimizer: torch.optim.Optimizer,
    *,
    before: Collection[nn.Parameter],
    remedy: str,
) -> None:
    """Refuse a user's optimizer that lacks what a strategy added, or holds nothing that trains.

    `before`: the model's parameters when the strategies came. Those of them that the optimizer
    lacks may have been left out on purpose.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    added = [name for name, p in trained.items() if p not in held and p not in before]
    if added:
        strategies = ", ".join(attachment.name for attachment in run.attachments)
        raise ValueError(
            f"optimizer={type(optimizer).__name__} was made before {strategies} added {added[0]!r} "
            f"(the first of {len(added)} tensors), and would not train it; {remedy}"
        )
    if trained and held.isdisjoint(trained.values()):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} holds none of the {len(trained)} parameters "
            f"that train; {remedy}"
        )
