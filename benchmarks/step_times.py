"""Steps of a random Llama that are timed part by part: forward with backward, then the update.

On the CPU time is the processor's, of all threads of the process, so that what else the machine
does is not in it (take torch to one thread: what waits for work spins); on a GPU it is wall time,
the device waited for. A case names a model of `benchmarks.shapes` and a number of tokens:
{"size": "8B", "tokens": 512}, with "layers" and "vocabulary" in place of the model's own, and a
"rank" where that is not the benchmark's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import memrt
from benchmarks.shapes import llama_config
from memrt.session import Session

if TYPE_CHECKING:
    from transformers import LlamaConfig

__all__ = [
    "Step",
    "Times",
    "case_config",
    "case_ids",
    "case_model",
    "case_name",
    "in_turns",
    "loss_of",
    "one_thread",
    "session_step",
    "timed",
]

Step = Callable[[Tensor], tuple[float, float]]
"""Takes ids [batch, tokens]; seconds of the whole step and of its update."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of whole steps and of their updates."""

    whole: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def add(self, pair: tuple[float, float]) -> None:
        """Of one step."""
        self.whole.append(pair[0])
        self.update.append(pair[1])


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    device: torch.device, before: Callable[[], object], update: Callable[[], object]
) -> tuple[float, float]:
    """Seconds of both, and of `update` alone."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begun = clock()
    before()
    _synchronize(device)
    between = clock()
    update()
    _synchronize(device)
    ended = clock()
    return ended - begun, ended - between


def case_config(case: Mapping[str, Any]) -> LlamaConfig:
    """Of the case's size, with fewer layers or a smaller vocabulary where it says so."""
    config = llama_config(case["size"])
    config.num_hidden_layers = case.get("layers", config.num_hidden_layers)
    config.vocab_size = case.get("vocabulary", config.vocab_size)
    return config


def case_name(case: Mapping[str, Any]) -> str:
    """A case in words."""
    layers = case.get("layers")
    part = "" if layers is None else f"{layers} layer{'s' if layers > 1 else ''} of "
    rank = f", rank {case['rank']}" if "rank" in case else ""
    return f"{part}{case['size']}, {case['tokens']} tokens{rank}"


def case_ids(case: Mapping[str, Any], sequence_length: int, device: torch.device) -> Tensor:
    """Random ids [tokens / length, length], the same every time; at most sequence_length long."""
    generator = torch.Generator().manual_seed(0)
    length = min(sequence_length, case["tokens"])
    shape = (case["tokens"] // length, length)
    return torch.randint(case_config(case).vocab_size, shape, generator=generator).to(device)


def case_model(case: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The case's model, random and in training mode."""
    return memrt.load(case_config(case), dtype=dtype, device=device, seed=0).train()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Of predicting every id from those before it."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def session_step(session: Session) -> Step:
    """A step of what `memrt.prepare` gives, of one micro-batch."""

    def before(ids: Tensor) -> None:
        with session.micro_batch(last=True):
            session.backward(loss_of(session.model, ids))

    return lambda ids: timed(ids.device, lambda: before(ids), session.step)


def in_turns(
    steps: Mapping[str, Step], ids: Tensor, *, warm_up: int, count: int
) -> dict[str, Times]:
    """Times of `count` steps of each, step by step; which one goes first rotates."""
    labels: Sequence[str] = list(steps)
    found = {label: Times() for label in labels}
    for index in range(warm_up + count):
        turn = index % len(labels)
        for label in (*labels[turn:], *labels[:turn]):
            pair = steps[label](ids)
            if index >= warm_up:
                found[label].add(pair)
    return found
