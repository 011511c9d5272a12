"""What to change when a run does not fit: the largest accounts, strategies and shapes, planned.

Every line has the number of a plan behind it (at most `MAX_PLANS` of them), or is arithmetic on the
plan that did not fit (the next card that would hold it).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from memrt import registry
from memrt.candidates import Rung, bring_parameters, rungs, why
from memrt.gpus import next_card
from memrt.profiling.report import format_bytes

if TYPE_CHECKING:
    from memrt.planning import Plan, Shape
    from memrt.strategy import Strategy

    PlanOf = Callable[..., Plan]
    """A stack's plan; `batch_size` and `sequence_length` replace those of the run."""

__all__ = [
    "MAX_PLANS",
    "Remedy",
    "advise",
    "card_remedy",
    "remedy_of",
    "shape_remedies",
    "shortfall",
]

MAX_PLANS = 6
_MAX_HALVINGS = 3
_SHORTEST = 64
_SMALLER_ACTIVATIONS = ("activation_checkpoint", "fused_loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One change, and what the run needs with it."""

    change: str
    device_bytes: int | None
    """High bound on the device; None where the change is another card."""
    fits: bool
    pinned_bytes: int | None = None
    """Pinned on the host; None where no host was named."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


def shortfall(planned: Plan) -> str:
    """What a plan needs and by how much that is too much, in words."""
    parts = []
    high = planned.device_bytes["high"]
    if planned.gpu is not None:
        over = high - planned.gpu.total_bytes
        room = f"{format_bytes(over)} over" if over > 0 else "within"
        parts.append(f"needs up to {format_bytes(high)}, {room} {planned.gpu.text}")
    if planned.host is not None and not planned.fits_host:
        pinned = format_bytes(planned.host_bytes["pinned"])
        parts.append(f"pins {pinned} on the host, which has {planned.host.text}")
    return " and ".join(parts)


def advise(
    planned: Plan,
    strategies: Sequence[Strategy],
    plan_of: PlanOf,
    *,
    hidden_size: int,
    max_grad_norm: float,
    shapes_are_free: bool,
) -> list[Remedy]:
    """What would make a plan fit that does not: more strategies, smaller shapes, another card."""
    remedies = _leaner(planned, strategies, plan_of)
    if any(remedy.fits for remedy in remedies):
        return [*remedies, *card_remedy(planned)]
    ladder = rungs(
        hidden_size=hidden_size,
        max_grad_norm=max_grad_norm,
        accumulation_steps=planned.shape.accumulation_steps,
    )
    for adds, found in _added(strategies, _additions(planned, strategies, ladder), plan_of):
        what = "; ".join(f"{_bare(name)}: {why(_bare(name), strategies)}" for name in adds)
        remedies.append(remedy_of(f"add {', '.join(adds)} ({what})", found))
        if found.fits or len(remedies) >= MAX_PLANS - 2:
            break
    if shapes_are_free:
        left = MAX_PLANS - len(remedies)
        remedies += shape_remedies(planned, strategies, plan_of, max_plans=left)
    return [*remedies, *card_remedy(planned)]


def _leaner(planned: Plan, strategies: Sequence[Strategy], plan_of: PlanOf) -> list[Remedy]:
    """The first of the strategies' own smaller settings that fits, and those before it.

    Where none fits, what keeps least.
    """
    remedies: list[Remedy] = []
    for index, strategy in enumerate(strategies if _has_room(planned) else ()):
        settings = strategy.leaner()
        last = _in_place_of(strategies, index, settings[-1], plan_of) if settings else None
        if last is None:
            continue
        if last.fits:
            tried = (_in_place_of(strategies, index, each, plan_of) for each in settings[:-1])
            return [*remedies, *_until_it_fits(tried, last)]
        remedies.append(last)
    return remedies


def _in_place_of(
    strategies: Sequence[Strategy], index: int, leaner: tuple[Strategy, str], plan_of: PlanOf
) -> Remedy | None:
    """The plan with one strategy's other settings; None where they are refused."""
    changed, what = leaner
    try:
        found = plan_of([*strategies[:index], changed, *strategies[index + 1 :]])
    except ValueError:  # a conflict, too
        return None
    return remedy_of(f"{changed} instead of {strategies[index]} ({what})", found)


def _until_it_fits(tried: Iterable[Remedy | None], last: Remedy) -> Iterator[Remedy]:
    for remedy in tried:
        if remedy is not None:
            yield remedy
            if remedy.fits:
                return
    yield last


def _additions(
    planned: Plan, strategies: Sequence[Strategy], ladder: Sequence[Rung]
) -> Iterator[list[str]]:
    """What to add, from the least change; what cannot be enough is left out."""
    wanted = {"full fine-tuning", "full fine-tuning, 8-bit optimizer state"}
    wanted |= {"adapters on weights in 4 bits"}
    wanted |= set() if bring_parameters(strategies) else {"low-rank updates"}
    for rung in ladder:
        if rung.title not in wanted or not (rung.adds or _has_room(planned)):
            continue
        adds = [n for n in (*rung.adds, *_SMALLER_ACTIVATIONS) if _adds_to(n, strategies)]
        if adds:
            yield adds


def _adds_to(spec: str, strategies: Sequence[Strategy]) -> bool:
    """Whether a stack lacks it; one whose own parameters train needs no second set of them."""
    if any(strategy.name == _bare(spec) for strategy in strategies):
        return False
    brings = registry.strategy_class(_bare(spec)).brings_parameters
    return not (brings and bring_parameters(strategies))


def _added(
    strategies: Sequence[Strategy], additions: Iterable[Sequence[str]], plan_of: PlanOf
) -> Iterator[tuple[tuple[str, ...], Plan]]:
    """Of all additions as many as go with the stack, and their plan; nothing twice."""
    seen: set[tuple[str, ...]] = set()
    refused: set[str] = set()
    for adds in additions:
        allowed = [spec for spec in adds if spec not in refused]
        found = _with_most(strategies, allowed, plan_of, seen)
        if found is not None:
            seen.add(found[0])
            refused.update(set(allowed) - set(found[0]))
            yield found


def _with_most(
    strategies: Sequence[Strategy],
    adds: Sequence[str],
    plan_of: PlanOf,
    seen: Collection[tuple[str, ...]],
) -> tuple[tuple[str, ...], Plan] | None:
    """The plan with the most additions that is not refused; None where that was seen."""
    for size in range(len(adds), 0, -1):
        for kept in combinations(adds, size):
            if kept in seen:
                return None
            try:
                return kept, plan_of(registry.parse_all([*map(str, strategies), *kept]))
            except ValueError:  # a conflict, too
                continue
    return None


def _has_room(planned: Plan) -> bool:
    """Whether weights, gradients and optimizer state leave anything of the device."""
    accounts = planned.simulation.peak.accounts
    held = sum(accounts[name] for name in ("weights", "gradients", "optimizer"))
    return planned.gpu is None or held < planned.gpu.total_bytes


def shape_remedies(
    planned: Plan, strategies: Sequence[Strategy], plan_of: PlanOf, *, max_plans: int
) -> list[Remedy]:
    """Halve the batch, then the sequence, until it fits or that is known not to be enough."""
    remedies: list[Remedy] = []
    if not _has_room(planned):
        return []  # what does not shrink with the batch is too much already
    for change, shape in _smaller_shapes(planned.shape):
        if len(remedies) == max_plans:
            break
        found = plan_of(strategies, **shape)
        remedies.append(remedy_of(change, found))
        if found.fits:
            break
    return remedies if any(remedy.fits for remedy in remedies) else remedies[-1:]


def _smaller_shapes(shape: Shape) -> Iterator[tuple[str, dict[str, int]]]:
    batch, length = shape.batch_size, shape.sequence_length
    for _ in range(_MAX_HALVINGS):
        if batch > 1:
            batch //= 2
            name = f"a batch of {batch} instead of {shape.batch_size}"
        elif length // 2 >= _SHORTEST:
            length //= 2
            name = f"a sequence of {length} tokens instead of {shape.sequence_length}"
            if shape.batch_size > 1:
                name = f"a batch of 1 and {name}"
        else:
            return
        yield name, {"batch_size": batch, "sequence_length": length}


def card_remedy(planned: Plan) -> list[Remedy]:
    high = planned.device_bytes["high"]
    if planned.gpu is None or high <= planned.gpu.total_bytes:
        return []
    card = next_card(high)
    if card is None:
        change = f"more than one card: no known card holds {format_bytes(high)}"
        return [Remedy(change=change, device_bytes=None, fits=False)]
    change = f"a larger card: {card} holds {format_bytes(high)}"
    return [Remedy(change=change, device_bytes=None, fits=bool(planned.fits_host in (None, True)))]


def remedy_of(change: str, found: Plan) -> Remedy:
    pinned = None if found.host is None else found.host_bytes["pinned"]
    high = found.device_bytes["high"]
    return Remedy(change=change, device_bytes=high, fits=bool(found.fits), pinned_bytes=pinned)


def _bare(spec: str) -> str:
    return spec.partition("(")[0]
