"""Every registered strategy and a list of stacks on the device: right, exact, resumable, tidy.

Small models of four families train in fp32, two micro-batches an optimizer step, under algorithms
that give the same bits each time; strategies have the settings and partners of `memrt.testing`, as
in the tests without a device. What is checked of a stack:

    trains          finite losses, and the first step's batches have a lower one after six steps
    deterministic   a second run gives the same bits, losses and weights
    first loss      that of the CPU, before anything was updated: within 1e-5 of it
    follows CPU     after one step on the CPU the run goes on from its checkpoint on CPU and device;
                    losses and gradient norms stay within 1e-4 of each other (see below)
    exact           the bits of the run without the strategies that promise it
    resume          three steps, a checkpoint, three steps: the bits of six steps
    detach          classes, attributes, hooks, `requires_grad` and weights as they were found, but
                    for the rounding of weights that were packed
    tidy            as many bytes alive after 40 steps as at most in the first 20 (Llama)
    pinned          what goes to the host lies in pinned memory (CUDA)

The run is handed over after one step because random sketches differ by device: from then on both
have the same basis. 1e-4: sums in another order differ by some 1e-6 in fp32, and the steps at this
learning rate move the loss by 1e-2 and more, so that a wrong gradient shows and rounding does not.
With state or weights in few bits it is 1e-2: codes at a boundary fall to either side.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import re
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
from memrt import registry, testing
from memrt.compose import conflicts
from memrt.runner import model_loss
from memrt.session import Session
from memrt.structure import Facts, RunSettings, discover
from memrt.testing import FAMILIES, tiny_batches, tiny_model

__all__ = ["Case", "cases", "main", "refusal"]

SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 1.0}
"""Of every run, and of what is asked whether it is refused."""

SKETCHED = ("galore", "q_galore", "fira")
"""A basis that is found again has random columns, or signs, that differ by device."""

HIDDEN = 64
"""Weights have 4096 elements and more, so that they get state in few bits."""

ROUNDED = ("nf4", "int8")
PACKING_ERROR = 0.2
"""Packed weights come back rounded: NF4 by half of its widest step, and its scale's rounding."""

FIRST_LOSS_TOLERANCE = 1e-5
FOLLOWS_TOLERANCE = 1e-4
FEW_BITS = ("int8_states", "fp8_states", "int4_states", "q_galore")
FEW_BITS_TOLERANCE = 1e-2
"""Sums in another order move codes at a boundary; bitsandbytes rounds otherwise on the CPU."""
PACKED_TOLERANCE = 1e-3
"""Of the first loss: a scale's code at a boundary moves 64 weights by 1 %."""
STEPS = 6
TIDY_STEPS = 40
CASE_SECONDS = 90.0
"""Triton's first compilations are in it."""
TINY_STACK = "nf4+peft+activation_checkpoint+fused_loss"


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
    learning_rate: float = 1e-2

    def begin(self, state: Mapping[str, Any] | None = None) -> Trained:
        """A fresh model with its strategies, or one that goes on from a checkpoint."""
        torch.manual_seed(0)
        model = tiny_model(self.family, hidden=HIDDEN).to(self.device).train()
        session = memrt.prepare(model, list(self.specs), lr=self.learning_rate, **SETTINGS)
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


def _alike_on_both(specs: Sequence[str]) -> tuple[str, ...]:
    """Without what is drawn on the device after the first step, as a basis of a layer anew is."""
    specs = [spec.replace("dropout=0.1", "dropout=0.0") for spec in specs]
    if any(spec.partition("(")[0] in SKETCHED for spec in specs):
        specs = [re.sub(r"every=\d+", "every=1000", spec) for spec in specs]
    return tuple(specs)


def _against_cpu(family: str, stack: str, device: torch.device) -> dict[str, Check]:
    """First loss, and five steps from one checkpoint, on both devices."""
    names = stack_of(stack)
    specs = _alike_on_both(testing.specs(names))
    on_cpu, on_device = (
        Case(family=family, specs=specs, device=place, learning_rate=1e-3)
        for place in (torch.device("cpu"), device)
    )
    tolerance = FEW_BITS_TOLERANCE if {*names} & {*FEW_BITS} else FOLLOWS_TOLERANCE
    at_first = PACKED_TOLERANCE if {*names} & {*ROUNDED} else FIRST_LOSS_TOLERANCE
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
        "first loss": _check(loss <= at_first, difference=loss),
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
    found = dict(model.state_dict())
    if any(spec in ROUNDED for spec in case.specs):
        off = [
            float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
            for name, value in weights.items()
        ]
        return _check(_looks(model) == looks and max(off) <= PACKING_ERROR, rounding=max(off))
    return _check(_looks(model) == looks and _equal(found, weights))


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
    names = stack_of(stack)
    case = Case(family=family, specs=tuple(testing.specs(names)), device=setting.device)
    whole, again = case.train(), case.train()
    same = _same_bits(again, whole)
    checks = {
        "trains": _trains(case, again),
        "deterministic": same,
        "resume": _resume(case, whole),
        "detach": _detach(case),
        **_against_cpu(family, stack, setting.device),
    }
    if family == "llama" and len(names) == 1:  # what is kept from step to step is alike elsewhere
        checks["tidy"] = _tidy(case, steps=8 if setting.tiny else TIDY_STEPS)
    if names and all(registry.parse(testing.SPECS.get(name, name)).exact for name in names):
        partners = tuple(
            spec for spec in testing.specs(names) if spec.partition("(")[0] not in names
        )
        checks["exact"] = _same_bits(whole, _without(family, partners, setting.device))
    if "offload_activations" in stack:
        checks["pinned"] = _pinned(case)
    return checks


def _trains(case: Case, run: Trained) -> Check:
    """The first step's batches once more."""
    case.advance(run, steps=1)
    losses = run.losses
    return _check(all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses=losses)


@cache
def _without(family: str, partners: tuple[str, ...], device: torch.device) -> Trained:
    return Case(family=family, specs=partners, device=device).train()


def refusal(family: str, stack: str) -> str | None:
    """Why a model refuses a stack; None when it takes it."""
    model = tiny_model(family, hidden=HIDDEN)
    settings = RunSettings(accumulation_steps=0, **SETTINGS)
    facts = Facts(model=model, structure=discover(model), settings=settings)
    problems = conflicts(registry.parse_all(testing.specs(stack_of(stack))), facts)
    return "; ".join(problems) or None


def _row(setting: Setting, family: str, stack: str) -> dict[str, Any]:
    reason = refusal(family, stack)
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


def cases(setting: Setting) -> dict[str, tuple[str, str]]:
    """Family and stack by the name of the case: single strategies, and the list of stacks."""
    if setting.tiny:
        return {
            "llama offload_activations": ("llama", "offload_activations"),
            "llama fp8_states": ("llama", "fp8_states"),
            "plain fused_loss": ("plain", "fused_loss"),
            f"stack llama {TINY_STACK}": ("llama", TINY_STACK),
        }
    found = {}
    for family in FAMILIES:
        head = [] if family == "plain" else ["fused_loss"]
        for stack in ("none", *registry.names()):
            found[f"{family} {stack}"] = (family, stack)
        for names in testing.STACKS:
            stack = "+".join([*names, *head])
            found[f"stack {family} {stack}"] = (family, stack)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Fill correctness.json."""
    setting = parse(argv, __doc__ or "")
    logging.getLogger("memrt").setLevel(logging.ERROR)  # what it advises on batches
    part = PartFile(setting, "correctness", case_seconds=CASE_SECONDS)
    Case(family="llama", specs=(), device=setting.device).train(steps=1)
    freeze()  # what the first run imported
    for key, (family, stack) in cases(setting).items():
        part.case(key, partial(_row, setting, family, stack))
    return 0


if __name__ == "__main__":
    sys.exit(main())
