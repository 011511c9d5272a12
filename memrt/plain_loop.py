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

from memrt import registry
from memrt.session import Session
from memrt.structure import RunSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from torch import nn

    from memrt.profiling.ledger import Ledger
    from memrt.strategy import Strategy

__all__ = ["prepare"]


def prepare(
    model: nn.Module,
    strategies: Sequence[str | Strategy | Mapping[str, Any]] = (),
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    accumulation_steps: int = 0,
    seed: int = 42,
    optimizer: torch.optim.Optimizer | None = None,
    ledger: Ledger | None = None,
    probe_batches: Callable[[int], Iterable[Any]] | None = None,
) -> Session:
    """Attach strategies to any `nn.Module` for a plain loop, with AdamW as the update rule.

    `accumulation_steps=0` says that the loop decides window by window. `optimizer` replaces the
    built one and is refused when a strategy brings a part of the optimizer.
    """
    settings = RunSettings(
        learning_rate=lr,
        betas=betas,
        epsilon=eps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        accumulation_steps=accumulation_steps,
        optimizer="adamw" if optimizer is None else type(optimizer).__name__,
        seed=seed,
    )
    run = Session(
        model,
        registry.parse_all(strategies),
        settings=settings,
        ledger=ledger,
        probe_batches=probe_batches,
    )
    try:
        run.adopt_optimizer(_optimizer(run, optimizer, weight_decay))
    except BaseException:
        run.detach()
        raise
    return run


def _optimizer(
    run: Session, given: torch.optim.Optimizer | None, weight_decay: float
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
    return given
