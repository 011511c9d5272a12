"""Every registered strategy and a list of stacks on the device: right, exact, resumable, tidy.

Small models of four families train in fp32, two micro-batches an optimizer step, under algorithms
that give the same bits each time. What is checked of a stack:

    trains          finite losses, and the last two are below the first two
    deterministic   a second run gives the same bits, losses and weights
    first loss      that of the CPU, before anything was updated: within 1e-5 of it
    follows CPU     after one step on the CPU the run goes on from its checkpoint on CPU and device;
                    losses and gradient norms stay within 1e-4 of each other (see below)
    exact           the bits of the run without strategies, for strategies that promise it
    resume          three steps, a checkpoint, three steps: the bits of six steps
    detach          classes, attributes, hooks, `requires_grad` and weights as they were found
    tidy            as many bytes alive after 50 steps as at most in the first 25 (Llama)
    pinned          what goes to the host lies in pinned memory (CUDA)

The run is handed over after one step because random sketches differ by device: from then on both
have the same basis. 1e-4: sums in another order differ by some 1e-6 in fp32, and the steps at this
learning rate move the loss by 1e-2 and more, so that a wrong gradient shows and rounding does not.
With 8-bit state it is 1e-2: bitsandbytes rounds otherwise on the CPU.
"""

from __future__ import annotations

import copy
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import memrt
from benchmarks.gpu.common import (
    PartFile,
    Setting,
    deterministic,
    freeze,
    live_bytes,
    parse,
    stack_of,
)
from memrt import registry
from memrt.compose import conflicts
from memrt.runner import model_loss
from memrt.session import Session
from memrt.structure import Facts, RunSettings, discover
from memrt.testing import FAMILIES, tiny_batches, tiny_model

__all__ = ["main"]

SETTINGS: dict[str, str] = {
    "activation_checkpoint": "activation_checkpoint",
    "fused_loss": "fused_loss(chunk_tokens=8)",
    "galore": "galore(rank=4, every=3)",
    "lisa": "lisa(layers=1, every=2)",
    "offload_activations": "offload_activations(min_bytes=0)",
}
"""What bites on a small model; other strategies run as they are."""

AGAINST_CPU = {**SETTINGS, "galore": "galore(rank=4, every=1000)"}
"""A basis that is found again has random columns, which differ by device."""

HIDDEN = 64
"""Weights have 4096 elements and more, so that they get 8-bit state."""

STACKS = (
    "activation_checkpoint+offload_activations",
    "activation_checkpoint+fused_loss",
    "lisa+int8_states",
    "galore+int8_states",
    "galore+activation_checkpoint",
    "galore+activation_checkpoint+fused_loss",
    "galore+lisa",
    "activation_checkpoint+offload_activations+lisa+int8_states+fused_loss",
)

FIRST_LOSS_TOLERANCE = 1e-5
FOLLOWS_TOLERANCE = 1e-4
INT8_TOLERANCE = 1e-2
"""bitsandbytes rounds codes in another way on the CPU (see `memrt.kernels.adamw_int8`)."""
STEPS = 6


@dataclass(slots=True)
class Trained:
    """A run so far."""

    model: nn.Module
    session: Session
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def checkpoint(self) -> dict[str, Any]:
        """Model and run state through a file, as a checkpoint goes."""
        buffer = io.BytesIO()
        state = {"model": self.model.state_dict(), "run": self.session.state_dict()}
        torch.save(copy.deepcopy(state), buffer)
        buffer.seek(0)
        loaded: dict[str, Any] = torch.load(buffer, weights_only=True, map_location="cpu")
        return loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A family under a stack, on one device."""

    family: str
    specs: tuple[str, ...]
    device: torch.device
    learning_rate: float = 3e-3

    def begin(self, state: Mapping[str, Any] | None = None) -> Trained:
        """A fresh model with its strategies, or one that goes on from a checkpoint."""
        torch.manual_seed(0)
        model = tiny_model(self.family, hidden=HIDDEN).to(self.device).train()
        session = memrt.prepare(
            model, list(self.specs), lr=self.learning_rate, weight_decay=0.1, max_grad_norm=1.0
        )
        if state is not None:
            own = copy.deepcopy(dict(state))  # an optimizer takes the tensors that it is given
            model.load_state_dict(own["model"])
            session.load_state_dict(own["run"])
        return Trained(model=model, session=session)

    def advance(self, run: Trained, *, steps: int, first: int = 0) -> Trained:
        """Train; batches and dropout depend on the step alone."""
        for step in range(first, first + steps):
            torch.manual_seed(1000 + step)
            window = tiny_batches(self.family, count=2, seed=step)
            total = 0.0
            for batch in window:
                moved = {name: value.to(self.device) for name, value in batch.items()}
                loss = run.session.train_micro_batch(
                    lambda moved=moved: model_loss(run.model, moved) / 2,  # type: ignore[misc]
                    last=batch is window[-1],
                )
                total += float(loss)
            norm = run.session.step()
            run.losses.append(total)
            run.norms.append(float(norm) if norm is not None else math.nan)
        return run

    def train(self, *, steps: int = STEPS) -> Trained:
        """From the beginning."""
        return self.advance(self.begin(), steps=steps)


Check = dict[str, Any]


def _check(passed: bool, **details: Any) -> Check:
    return {"passed": bool(passed), **details}


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def _same_bits(one: Trained, other: Trained, *, skip: int = 0) -> Check:
    """Losses from `skip` on, and weights."""
    losses = one.losses[skip:] == other.losses[-len(one.losses[skip:]) :]
    return _check(losses and _equal(one.weights(), other.weights()), losses_equal=losses)


def _largest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative difference; infinite where one is not a number."""
    found = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(one, other, strict=True)]
    return max((math.inf if math.isnan(value) else value for value in found), default=0.0)


def _no_dropout(model: nn.Module) -> None:
    """Random masks differ by device."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _against_cpu(family: str, stack: str, device: torch.device) -> dict[str, Check]:
    """First loss, and five steps from one checkpoint, on both devices."""
    specs = tuple(AGAINST_CPU.get(name, name) for name in stack_of(stack))
    on_cpu, on_device = (
        Case(family=family, specs=specs, device=place, learning_rate=1e-3)
        for place in (torch.device("cpu"), device)
    )
    tolerance = INT8_TOLERANCE if "int8_states" in specs else FOLLOWS_TOLERANCE
    first = []
    for place in (on_cpu, on_device):
        run = place.begin()
        _no_dropout(run.model)
        first.append(place.advance(run, steps=1))
    state = first[0].checkpoint()
    followed = []
    for place in (on_cpu, on_device):
        run = place.begin(state)
        _no_dropout(run.model)
        followed.append(place.advance(run, steps=STEPS - 1, first=1))
    loss = _largest_difference(first[1].losses, first[0].losses)
    losses = _largest_difference(followed[1].losses, followed[0].losses)
    norms = _largest_difference(followed[1].norms, followed[0].norms)
    return {
        "first loss": _check(loss <= FIRST_LOSS_TOLERANCE, difference=loss),
        "follows CPU": _check(max(losses, norms) <= tolerance, losses=losses, gradient_norms=norms),
    }


def _resume(case: Case, whole: Trained) -> Check:
    half = STEPS // 2
    state = case.train(steps=half).checkpoint()
    resumed = case.advance(case.begin(state), steps=STEPS - half, first=half)
    return _same_bits(resumed, whole)


def _looks(model: nn.Module) -> dict[str, Any]:
    return {
        name: (
            type(module),
            sorted(vars(module)),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            [(n, p.requires_grad) for n, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def _detach(case: Case) -> Check:
    torch.manual_seed(0)
    model = tiny_model(case.family, hidden=HIDDEN).to(case.device)
    next(model.parameters()).requires_grad_(False)
    looks = _looks(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    session = memrt.prepare(model, list(case.specs))
    session.begin_step()
    session.detach()
    return _check(_looks(model) == looks and _equal(dict(model.state_dict()), weights))


def _tidy(case: Case, *, steps: int) -> Check:
    """Bytes alive after each step."""
    run = case.begin()
    alive = []
    for step in range(steps):
        case.advance(run, steps=1, first=step)
        alive.append(live_bytes(case.device))
    early, late = max(alive[: steps // 2]), alive[-1]
    return _check(late <= early, early_bytes=early, late_bytes=late, steps=steps)


def _pinned(case: Case) -> Check:
    run = case.begin()
    on_device = torch.arange(4096, dtype=torch.float32, device=case.device)
    moved = run.session.move(on_device, "host")
    back = run.session.move(moved, "device")
    return _check(
        moved.device.type == "cpu"
        and moved.is_pinned() == (case.device.type == "cuda")
        and back.device == case.device
        and torch.equal(back, on_device),
        is_pinned=moved.is_pinned(),
    )


@contextmanager
def _algorithms(*, strict: bool) -> Iterator[None]:
    """The same bits each time; not `strict` for a model that has an operator which cannot."""
    with ExitStack() as stack:
        if strict:
            stack.enter_context(deterministic())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _checks(setting: Setting, family: str, stack: str) -> dict[str, Check]:
    specs = tuple(SETTINGS.get(name, name) for name in stack_of(stack))
    case = Case(family=family, specs=specs, device=setting.device)
    strategies = registry.parse_all(specs)
    whole = case.train()
    losses = whole.losses
    checks = {
        "trains": _check(
            all(map(math.isfinite, losses)) and sum(losses[-2:]) < sum(losses[:2]), losses=losses
        ),
        "deterministic": _same_bits(case.train(), whole),
        "resume": _resume(case, whole),
        "detach": _detach(case),
        **_against_cpu(family, stack, setting.device),
    }
    if family == "llama":  # what a strategy keeps from step to step is the same for all families
        checks["tidy"] = _tidy(case, steps=8 if setting.tiny else 50)
    if strategies and all(strategy.exact for strategy in strategies):
        checks["exact"] = _same_bits(whole, _without(family, setting.device))
    if "offload_activations" in stack:
        checks["pinned"] = _pinned(case)
    return checks


@cache
def _without(family: str, device: torch.device) -> Trained:
    return Case(family=family, specs=(), device=device).train()


def _refusal(family: str, stack: str) -> str | None:
    """Why a model refuses a stack; None when it takes it."""
    model = tiny_model(family, hidden=HIDDEN)
    facts = Facts(model=model, structure=discover(model), settings=RunSettings())
    problems = conflicts(registry.parse_all(stack_of(stack)), facts)
    return "; ".join(problems) or None


def _row(setting: Setting, family: str, stack: str) -> dict[str, Any]:
    reason = _refusal(family, stack)
    if reason is not None:
        return {"status": "refused", "reason": reason, "family": family, "stack": stack}
    strict = True
    try:
        with _algorithms(strict=True):
            checks = _checks(setting, family, stack)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        strict = False
        with _algorithms(strict=False):
            checks = _checks(setting, family, stack)
    failed = [name for name, check in checks.items() if not check["passed"]]
    return {
        "status": "failed" if failed else "passed",
        "reason": ", ".join(failed) or None,
        "family": family,
        "stack": stack,
        "checks": checks,
        "deterministic_algorithms": strict,
    }


def _cases(setting: Setting) -> Iterator[tuple[str, str]]:
    if setting.tiny:
        yield from (("llama", "offload_activations"), ("llama", STACKS[5]), ("plain", "fused_loss"))
        return
    for family in FAMILIES:
        for stack in ("none", *registry.names(), *STACKS):
            yield family, stack


def main(argv: Sequence[str] | None = None) -> int:
    """Fill correctness.json."""
    setting = parse(argv, __doc__ or "")
    part = PartFile(setting, "correctness")
    Case(family="llama", specs=(), device=setting.device).train(steps=1)
    freeze()  # what the first run imported
    for family, stack in _cases(setting):
        part.case(f"{family} {stack}", partial(_row, setting, family, stack))
    return 0


if __name__ == "__main__":
    sys.exit(main())
