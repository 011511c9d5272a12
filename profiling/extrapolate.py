"""From a few simulated layers to many: every segment's peak is affine in the number of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from memrt.profiling.accounts import Place
from memrt.profiling.outside import Outside
from memrt.profiling.timeline import Breakdown, Record, Region, Timeline

__all__ = ["Segment", "Simulation", "extrapolate", "segment"]

Segment = tuple[int, str, str]
"""Step, phase, and which layer (or which module outside the layers)."""

MIDDLE = "layer:middle"

_ALLOCATION_BYTES = 512  # the CUDA caching allocator's rounding

Work = Mapping[tuple[int, str], int]
"""FLOPs or bytes by optimizer step and by phase or direction."""


def segment(
    layer_of: Callable[[str], str | None], layer_names: Sequence[str]
) -> Callable[[Region], Segment]:
    """Groups regions by step, phase and place in the stack of layers."""
    last = len(layer_names) - 1
    labels = {
        name: {
            0: "layer:first",
            1: "layer:second",
            last - 1: "layer:last-1",
            last: "layer:last",
        }.get(index, MIDDLE)
        for index, name in enumerate(layer_names)
    }

    def of(region: Region) -> Segment:
        layer = layer_of(region.module)
        return region.step, region.phase, labels[layer] if layer else region.module

    return of


def _rounded(record: Record) -> int:
    return -(-record.num_bytes // _ALLOCATION_BYTES) * _ALLOCATION_BYTES


def _pinned(record: Record) -> int:
    """Pinned blocks have sizes of powers of two (docs of torch.cuda.memory.host_memory_stats)."""
    return 1 << (record.num_bytes - 1).bit_length() if record.num_bytes else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What one run under the ledger needs, reduced to its peaks."""

    segments: Mapping[Segment, Breakdown]
    rounded: Mapping[Segment, int]
    place_peaks: Mapping[str, int]
    account_maxima: Mapping[str, int]
    top_allocations: Sequence[Mapping[str, Any]]
    pinned_peak_bytes: int = 0
    """The host's peak with every storage rounded up as the pinned allocator does."""
    routed: bool = False
    """Whether a router picked experts, so that the bytes may depend on values."""
    flops: Work = field(default_factory=dict)
    """FLOPs by optimizer step and phase."""
    moved: Work = field(default_factory=dict)
    """Bytes moved by optimizer step and direction."""
    uncounted: frozenset[str] = frozenset()
    """Operators that multiply and whose FLOPs nobody could count."""
    outside: Outside | None = None
    """What loading, evaluation, saving and resuming need; None where none was simulated."""

    @classmethod
    def of(cls, timeline: Timeline, key: Callable[[Region], Segment], **work: Any) -> Simulation:
        """Reduce a timeline. `work`: the fields that are not in it."""
        rounded: dict[Segment, int] = {}
        for _, live, region in timeline.live_bytes(size=_rounded):
            if region is not None:
                group = key(region)
                rounded[group] = max(rounded.get(group, 0), live)
        return cls(
            segments=timeline.peaks_by(key),
            rounded=rounded,
            place_peaks={
                place.value: max(
                    (live for _, live, _ in timeline.live_bytes(place=place)), default=0
                )
                for place in Place
            },
            account_maxima=timeline.account_maxima(),
            top_allocations=timeline.top_allocations(timeline.peak().instant),
            pinned_peak_bytes=max(
                (live for _, live, _ in timeline.live_bytes(place=Place.HOST, size=_pinned)),
                default=0,
            ),
            **work,
        )

    @property
    def peak(self) -> Breakdown:
        """The breakdown at the highest segment (the first of several)."""
        return max(self.segments.values(), key=lambda found: (found.peak_bytes, -found.instant))

    @property
    def rounded_peak_bytes(self) -> int:
        """The peak with every storage rounded up as the CUDA allocator does."""
        return max(self.rounded.values())

    def phases(self) -> dict[str, int]:
        """Peak of every phase."""
        peaks: dict[str, int] = {}
        for (_, phase, _), found in self.segments.items():
            peaks[phase] = max(peaks.get(phase, 0), found.peak_bytes)
        return peaks

    def of_step(self, work: Work, *, first: bool = False) -> dict[str, int]:
        """The entries of one step: the last that was run (the steady state), or the first."""
        steps = [step for step, _ in work if step >= 0]  # before the steps: loading
        step = min(steps, default=0) if first else max(steps, default=0)
        return {name: value for (at, name), value in work.items() if at == step}

    def work_json(self) -> dict[str, Any]:
        """What an optimizer step costs in arithmetic and transfers."""
        flops, moved = self.of_step(self.flops), self.of_step(self.moved)
        return {
            "flops": sum(flops.values()),
            "flops_by_phase": flops,
            "first_step_flops": sum(self.of_step(self.flops, first=True).values()),
            "uncounted_operators": sorted(self.uncounted),
            "transfer_bytes": sum(moved.values()),
            "transfers": moved,
        }

    def to_json(self) -> dict[str, Any]:
        """The report's memory part."""
        return {
            **self.peak.to_json(),
            "rounded_peak_bytes": self.rounded_peak_bytes,
            "phases": self.phases(),
            "place_peaks": dict(self.place_peaks),
            "pinned_peak_bytes": self.pinned_peak_bytes,
            "account_maxima": dict(self.account_maxima),
            "top_allocations": [dict(item) for item in self.top_allocations],
        }


def _affine(low: int, high: int, steps: int) -> int:
    """The value `steps` layers above `high`, `low` being one layer below it."""
    return high + (high - low) * steps


def _affine_map(
    low: Mapping[Any, int], high: Mapping[Any, int], steps: int
) -> dict[Any, int] | None:
    if low.keys() != high.keys():
        return None
    return {key: _affine(low[key], high[key], steps) for key in high}


def _affine_breakdown(low: Breakdown, high: Breakdown, steps: int) -> Breakdown | None:
    accounts = _affine_map(low.accounts, high.accounts, steps)
    places = _affine_map(low.places, high.places, steps)
    owners = _affine_map(low.owners, high.owners, steps)
    if accounts is None or places is None or owners is None:
        return None
    return replace(
        high,
        peak_bytes=_affine(low.peak_bytes, high.peak_bytes, steps),
        accounts=accounts,
        places=places,
        owners=dict(sorted(owners.items(), key=lambda item: -item[1])),
    )


def _forward(low: Simulation, high: Simulation, steps: int) -> Simulation | None:
    """Both simulations one layer apart, carried `steps` layers on; None where they do not match."""
    segments: dict[Segment, Breakdown] = {}
    rounded: dict[Segment, int] = {}
    for key in high.segments:
        if key[2] == MIDDLE:
            continue  # lies between the second and the last but one
        if key not in low.segments:
            return None
        found = _affine_breakdown(low.segments[key], high.segments[key], steps)
        if found is None:
            return None
        segments[key] = found
        rounded[key] = _affine(low.rounded[key], high.rounded[key], steps)
    places = _affine_map(low.place_peaks, high.place_peaks, steps)
    maxima = _affine_map(low.account_maxima, high.account_maxima, steps)
    flops = _affine_map(low.flops, high.flops, steps)
    moved = _affine_map(low.moved, high.moved, steps)
    if places is None or maxima is None or flops is None or moved is None:
        return None
    return Simulation(
        segments=segments,
        rounded=rounded,
        place_peaks=places,
        account_maxima=maxima,
        top_allocations=high.top_allocations,
        pinned_peak_bytes=_affine(low.pinned_peak_bytes, high.pinned_peak_bytes, steps),
        routed=high.routed,
        flops=flops,
        moved=moved,
        uncounted=low.uncounted | high.uncounted,
        outside=None
        if low.outside is None or high.outside is None
        else high.outside.carried(low.outside, steps),
    )


def _equal(one: Simulation, other: Simulation) -> bool:
    keys = {key for key in other.segments if key[2] != MIDDLE}
    return (
        keys == set(one.segments)
        and all(
            one.segments[key].peak_bytes == other.segments[key].peak_bytes
            and one.segments[key].accounts == other.segments[key].accounts
            and one.segments[key].places == other.segments[key].places
            and one.segments[key].owners == other.segments[key].owners
            and one.rounded[key] == other.rounded[key]
            for key in keys
        )
        and one.peak.peak_bytes == other.peak.peak_bytes
        and one.peak.accounts == other.peak.accounts
        and one.place_peaks == other.place_peaks
        and one.account_maxima == other.account_maxima
        and one.pinned_peak_bytes == other.pinned_peak_bytes
        and one.flops == other.flops
        and one.moved == other.moved
        and one.outside == other.outside
    )


def extrapolate(simulations: Mapping[int, Simulation], num_layers: int) -> Simulation | None:
    """Carry three simulations of consecutive depths to `num_layers`.

    None when the third depth does not confirm what the first two predict; run every layer then.
    """
    first, second, third = sorted(simulations)
    if (second, third) != (first + 1, first + 2) or num_layers <= third:
        raise ValueError(f"depths {sorted(simulations)} cannot be carried to {num_layers} layers")
    predicted = _forward(simulations[first], simulations[second], 1)
    if predicted is None or not _equal(predicted, simulations[third]):
        return None
    return _forward(simulations[second], simulations[third], num_layers - third)
