"""Climbing from the least change of training to the largest until a stack fits (`memrt.auto`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from memrt import registry
from memrt.advice import Remedy, card_remedy, remedy_of, shape_remedies, shortfall
from memrt.candidates import ACTIVATIONS, Rung
from memrt.compatibility import verdict_of
from memrt.errors import ConflictError
from memrt.profiling.report import format_bytes

if TYPE_CHECKING:
    from memrt.gpus import Gpu
    from memrt.planning import Plan
    from memrt.strategy import Strategy
    from memrt.structure import Facts

__all__ = [
    "ASSUMED_BYTES_PER_SECOND",
    "ASSUMED_FLOPS_PER_SECOND",
    "FULL",
    "Candidate",
    "Search",
]

ASSUMED_FLOPS_PER_SECOND = 100e12
"""About what dense bf16 products reach on a card of 2023. Orders stacks; predicts no time."""
ASSUMED_BYTES_PER_SECOND = 25e9
"""About what PCIe 4.0 x16 moves from pinned memory. Orders stacks; predicts no time."""

FULL = "full_parameters=True asks that all weights train with AdamW"

_NEAR = 1.1
"""A rung whose smallest stack is at most so far over the budget is planned as a whole: a way of
keeping activations may cost memory at another instant than it saves."""

_CHANGES = frozenset(
    {"adalomo", "apollo", "apollo_mini", "badam", "fira", "galore", "ladder", "lisa"}
)
_CHANGES |= {"lomo", "peft", "q_galore"}
"""Strategies that say what trains or how; where the user named one, no other is added."""

_FORMATS = frozenset({"fp8_states", "int4_states", "int8_states"})
"""Of these a stack has one; what the user named stays."""

_KEEP_GRADIENTS = frozenset(
    {
        "activation_checkpoint",
        "fp8_states",
        "fused_loss",
        "int4_states",
        "int8_states",
        "offload_activations",
    }
)
"""Strategies beside which all weights and, at the step, their gradients are on the device."""

Verdict = Literal["chosen", "costs more", "too large", "refused", "not planned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One stack that was looked at, and why it was taken or not."""

    stack: str
    rung: str
    verdict: Verdict
    sentence: str
    device_bytes: int | None = None
    flops: int | None = None
    transfer_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


class Search:
    """Climbs the rungs until one has a stack that fits."""

    def __init__(
        self,
        *,
        named: tuple[Strategy, ...],
        plan_of: Callable[..., Plan],
        facts: Facts,
        budget: Gpu,
    ) -> None:
        self.named = named
        self.plan_of = plan_of
        self.facts = {"model": facts}
        self.budget = budget
        self.candidates: list[Candidate] = []
        self.chosen: tuple[Rung, list[Strategy], Plan] | None = None
        self.smallest: tuple[Rung, list[Strategy], Plan] | None = None
        self._seen: set[tuple[str, ...]] = set()
        self._unplanned: list[tuple[Rung, list[Strategy]]] = []

    def leave_out(self, rung: Rung, sentence: str, verdict: Verdict = "not planned") -> None:
        """A rung that is not tried."""
        label = "+".join((*map(str, self.named), *self._added(rung))) or "none"
        self._note(label, rung, verdict, sentence)

    def climb(self, rung: Rung) -> bool:
        """Take the cheapest stack of the rung that fits, if there is one."""
        stacks = self._stacks(rung)
        if not stacks:
            return False
        too_much = self._held_at_least(rung)
        if too_much is not None:
            self._unplanned.append((rung, stacks[-1]))
            for stack in stacks:
                self._note(_label(stack), rung, "not planned", too_much)
            return False
        least = {_label(stack): self._planned(rung, stack) for stack in _least(stacks)}
        found = {label: plan for label, plan in least.items() if plan is not None}
        if found and not any(map(self._is_near, found.values())):
            self._pass_over(rung, stacks, least, found)
            return False
        self._take_cheapest(rung, self._fitting(rung, stacks, least))
        return self.chosen is not None

    def _pass_over(
        self,
        rung: Rung,
        stacks: list[list[Strategy]],
        least: Mapping[str, Plan | None],
        found: Mapping[str, Plan],
    ) -> None:
        """Even what keeps least is far over the budget; the others of the rung are not planned."""
        for label, plan in found.items():
            self._note(label, rung, "too large", shortfall(plan), plan)
        lowest = min(found, key=lambda label: found[label].device_bytes["high"])
        sentence = f"not planned: taken to need more than {lowest}"
        for stack in stacks:
            if _label(stack) not in least:
                self._note(_label(stack), rung, "not planned", sentence)

    def _fitting(
        self, rung: Rung, stacks: list[list[Strategy]], least: Mapping[str, Plan | None]
    ) -> list[tuple[list[Strategy], Plan]]:
        """The stacks that fit; what only adds to one of them is not planned."""
        fitting: list[tuple[list[Strategy], Plan]] = []
        for stack in stacks:
            inside = [fits for fits, _ in fitting if set(map(str, fits)) <= set(map(str, stack))]
            if inside:
                sentence = f"not needed: {_label(inside[0])} fits without what it adds"
                self._note(_label(stack), rung, "not planned", sentence)
                continue
            label = _label(stack)
            found = least[label] if label in least else self._planned(rung, stack)
            if found is not None and not found.fits:
                self._note(label, rung, "too large", shortfall(found), found)
            elif found is not None:
                fitting.append((stack, found))
            if fitting and not _paid(stack, self.named):
                break  # nothing is cheaper than what neither computes again nor moves
        return fitting

    def _held_at_least(self, rung: Rung) -> str | None:
        """Why no stack of a rung can fit, from the weights alone; None where it may."""
        if rung.holds == "packed" or not {s.name for s in self.named} <= _KEEP_GRADIENTS:
            return None
        weights = sum(p.nbytes for p in self.facts["model"].model.parameters())
        held = 2 * weights if rung.holds == "gradients" else weights
        if held <= self.budget.total_bytes:
            return None
        what = "weights and gradients" if rung.holds == "gradients" else "the weights"
        return f"not planned: {what} alone take {format_bytes(held)}"

    def _take_cheapest(self, rung: Rung, fitting: list[tuple[list[Strategy], Plan]]) -> None:
        for rank, (stack, found) in enumerate(sorted(fitting, key=lambda item: _cost(item[1]))):
            if rank == 0:
                self.chosen = (rung, stack, found)
                sentence = f"the cheapest of its kind that fits: {_work(found)}"
                self._note(_label(stack), rung, "chosen", sentence, found)
            else:
                sentence = f"fits and costs more: {_work(found)}"
                self._note(_label(stack), rung, "costs more", sentence, found)

    def _added(self, rung: Rung) -> list[str]:
        """What a rung adds to what was named."""
        names = {strategy.name for strategy in self.named}
        taken = names | (_FORMATS if names & _FORMATS else set())
        return [spec for spec in rung.adds if _bare(spec) not in taken]

    def _stacks(self, rung: Rung) -> list[list[Strategy]]:
        """The rung's stacks that can run and were not looked at yet."""
        names = {strategy.name for strategy in self.named}
        adds = self._added(rung)
        clash = sorted(_CHANGES & names)
        if clash and _CHANGES & {_bare(spec) for spec in adds}:
            self.leave_out(rung, f"you named {clash[0]}, which says what trains")
            return []
        stacks = []
        for kept in ACTIVATIONS:
            specs = [*adds, *(name for name in kept if name not in names)]
            stack = registry.parse_all([*self.named, *specs])
            key = tuple(map(str, stack))
            if key not in self._seen:
                self._seen.add(key)
                stacks.append(stack)
        allowed = []
        for stack in stacks:
            problems = verdict_of(stack, self.facts).reasons["model"]
            if problems:
                self._note(_label(stack), rung, "refused", "; ".join(problems))
            else:
                allowed.append(stack)
        return allowed

    def _planned(self, rung: Rung, stack: list[Strategy]) -> Plan | None:
        try:
            found = self.plan_of(stack)
        except (ConflictError, ValueError) as error:
            self._note(_label(stack), rung, "refused", " ".join(str(error).split()))
            return None
        least = self.smallest
        if least is None or found.device_bytes["high"] < least[2].device_bytes["high"]:
            self.smallest = (rung, stack, found)
        return found

    def _is_near(self, found: Plan) -> bool:
        assert found.gpu is not None
        return found.device_bytes["high"] <= _NEAR * found.gpu.total_bytes

    def _note(
        self, label: str, rung: Rung, verdict: Verdict, sentence: str, found: Plan | None = None
    ) -> None:
        self.candidates.append(
            Candidate(
                stack=label,
                rung=rung.title,
                verdict=verdict,
                sentence=sentence,
                device_bytes=None if found is None else found.device_bytes["high"],
                flops=None if found is None else found.flops,
                transfer_bytes=None if found is None else found.transfer_bytes,
            )
        )

    def remedies(self, *, shapes_are_free: bool) -> list[Remedy]:
        """What to change, when no rung had a stack that fits."""
        if self.smallest is None and self._unplanned:
            self._planned(*self._unplanned[-1])
        if self.smallest is None:
            raise ConflictError(list(dict.fromkeys(c.sentence for c in self.candidates)))
        _, stack, found = self.smallest
        remedies: list[Remedy] = []
        if shapes_are_free:
            remedies += shape_remedies(found, stack, self.plan_of, max_plans=3)
        if any(candidate.sentence == FULL for candidate in self.candidates):
            remedies += self._without_full_parameters()
        return remedies + card_remedy(found)

    def _without_full_parameters(self) -> list[Remedy]:
        names = {strategy.name for strategy in self.named}
        adds = ("nf4", "peft", "activation_checkpoint", "fused_loss")
        stack = registry.parse_all([*self.named, *(name for name in adds if name not in names)])
        if verdict_of(stack, self.facts).reasons["model"]:
            return []
        found = self.plan_of(stack)
        change = f"{_label(stack)}, which does not train all weights (full_parameters=False)"
        return [remedy_of(change, found)]


def _least(stacks: list[list[Strategy]]) -> list[list[Strategy]]:
    """What keeps least of a rung: the last, and what is offloaded without being computed again.

    A layer that is computed again is on the device as a whole; what is offloaded comes back tensor
    by tensor.
    """
    names = [{strategy.name for strategy in stack} for stack in stacks]
    whole = [index for index, found in enumerate(names) if "activation_checkpoint" not in found]
    if whole and whole[-1] != len(stacks) - 1 and "offload_activations" in names[whole[-1]]:
        return [stacks[whole[-1]], stacks[-1]]
    return stacks[-1:]


def _paid(stack: Sequence[Strategy], named: Sequence[Strategy]) -> bool:
    """Whether a stack adds what costs FLOPs or transfers."""
    added = {strategy.name for strategy in stack} - {strategy.name for strategy in named}
    return bool(added & {"activation_checkpoint", "offload_activations"})


def _bare(spec: str) -> str:
    return spec.partition("(")[0]


def _label(stack: Sequence[Strategy]) -> str:
    return "+".join(map(str, stack)) or "none"


def _cost(found: Plan) -> float:
    compute = found.flops / ASSUMED_FLOPS_PER_SECOND
    return compute + found.transfer_bytes / ASSUMED_BYTES_PER_SECOND


def _work(found: Plan) -> str:
    moved = found.transfer_bytes
    transfers = f" and {format_bytes(moved)} moved" if moved else ""
    return f"{found.flops / 1e12:,.3g} TFLOP{transfers} a step, up to " + format_bytes(
        found.device_bytes["high"]
    )
