"""What to change when a run does not fit: the largest accounts, strategies and shapes, planned.

Every line has the number of a plan behind it (at most `MAX_PLANS` of them), or is arithmetic on the
plan that did not fit (the next card that would hold it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memrt import registry
from memrt.candidates import WHY, Rung, rungs
from memrt.errors import ConflictError
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
    remedies: list[Remedy] = []
    named = {strategy.name for strategy in strategies}
    num_plans = 0
    ladder = rungs(
        hidden_size=hidden_size,
        max_grad_norm=max_grad_norm,
        accumulation_steps=planned.shape.accumulation_steps,
    )
    for adds in _additions(planned, named, ladder):
        stack = [*map(str, strategies), *adds]
        try:
            found = plan_of(registry.parse_all(stack))
        except (ConflictError, ValueError):
            continue
        num_plans += 1
        what = "; ".join(f"{_bare(name)}: {WHY[_bare(name)]}" for name in adds)
        remedies.append(remedy_of(f"add {', '.join(adds)} ({what})", found))
        if found.fits or num_plans == MAX_PLANS - 2:
            break
    if shapes_are_free:
        remedies += shape_remedies(planned, strategies, plan_of, max_plans=MAX_PLANS - num_plans)
    return [*remedies, *card_remedy(planned)]


def _additions(planned: Plan, named: set[str], ladder: Sequence[Rung]) -> Iterator[list[str]]:
    """Stacks to try, from the least change; those that cannot be enough are left out."""
    wanted = {"full fine-tuning", "full fine-tuning, 8-bit optimizer state", "low-rank updates"}
    wanted |= {"adapters on weights in 4 bits"}
    seen: set[tuple[str, ...]] = set()
    for rung in ladder:
        if rung.title not in wanted or not (rung.adds or _has_room(planned)):
            continue
        adds = [n for n in (*rung.adds, *_SMALLER_ACTIVATIONS) if _bare(n) not in named]
        if adds and tuple(adds) not in seen:
            seen.add(tuple(adds))
            yield adds


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
