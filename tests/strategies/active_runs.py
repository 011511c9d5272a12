"""Tiny models under strategies that train a part of the model at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from memrt.runner import model_loss
from memrt.session import Session
from tests.strategies.runs import batch_of

__all__ = [
    "LAYERS",
    "OUTSIDE",
    "active_of",
    "ideal_bytes",
    "names_of",
    "state_bytes",
    "steps_of",
    "train",
    "trainable",
    "weights",
]

LAYERS = 4
OUTSIDE = {
    "llama": {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"},
    "gpt2": {
        "transformer.wte.weight",  # the head's too
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    },
    "plain": {"embedding.weight", "head.weight", "head.bias"},
}
_PREFIX = {"llama": "model.layers.", "gpt2": "transformer.h.", "plain": "layers."}


def steps_of(
    run: Session, family: str, *, first: int = 0, count: int, micro_batches: int = 1
) -> Iterator[int]:
    """Train; yields after every optimizer step. Batches and dropout depend on the step alone."""
    for step in range(first, first + count):
        torch.manual_seed(500 + step)
        for index in range(micro_batches):
            with run.micro_batch(last=index == micro_batches - 1):
                run.backward(model_loss(run.model, batch_of(family, seed=10 * step + index)))
        run.step()
        yield step


def train(run: Session, family: str, *, first: int = 0, count: int, **options: int) -> None:
    """All of these steps."""
    for _ in steps_of(run, family, first=first, count=count, **options):
        pass


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trainable(model: nn.Module) -> set[str]:
    """Names of what trains now."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


def active_of(run: Session, strategy: str) -> list[int]:
    """The active blocks of a strategy, by their index."""
    found: list[int] = next(a for a in run.attachments if a.name == strategy).active  # type: ignore[attr-defined]
    return found


def names_of(model: nn.Module, family: str, layers: Iterable[int]) -> set[str]:
    """Names of the parameters of these layers."""
    prefixes = tuple(f"{_PREFIX[family]}{layer}." for layer in layers)
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in the optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def ideal_bytes(model: nn.Module, names: set[str]) -> int:
    """8 bytes an element for two moments, and a step counter of 4 bytes for every tensor."""
    return sum(8 * p.numel() + 4 for name, p in model.named_parameters() if name in names)
