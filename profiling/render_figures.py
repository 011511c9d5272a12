"""The pictures of a report as plain data, drawn by the HTML page and by matplotlib alike.

A picture shows numbers that stand in a table of the same report too; nothing is only in a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memrt.profiling.accounts import Account
from memrt.profiling.render_sections import account_title
from memrt.profiling.report import format_bytes

__all__ = [
    "ACCOUNTS",
    "KEYS",
    "Areas",
    "Band",
    "Bar",
    "Bars",
    "Figure",
    "Lines",
    "figures",
    "key_title",
    "ticks",
]

Report = Mapping[str, Any]

ACCOUNTS = tuple(account.value for account in Account)
TOTAL = "total"
"""The key of a bar that is not split into accounts."""
SAVED = "saved"
ADDED = "added"
KEYS = (*ACCOUNTS, TOTAL, SAVED, ADDED)
"""What a segment can stand for, from left to right."""
_TITLES = {TOTAL: "what remains", SAVED: "what it saves", ADDED: "what it adds"}

_MAX_OWNERS = 12
_UNITS = (("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A horizontal bar of one or more segments: (key of the colour, value)."""

    label: str
    segments: Sequence[tuple[str, float]]
    text: str
    """The whole as text, beside the bar."""
    mark: float | None = None
    """A second reading of the same quantity, shown as a line across the bar."""

    @property
    def total(self) -> float:
        """The bar's length."""
        return sum(value for _, value in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars on one scale."""

    title: str
    note: str
    bars: Sequence[Bar]
    in_bytes: bool = True
    mark: str = ""
    """What the bars' marks stand for."""

    @property
    def longest(self) -> float:
        """The scale's end."""
        return max((max(bar.total, bar.mark or 0) for bar in self.bars), default=0) or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Consecutive samples of one phase of one step."""

    step: int
    phase: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Areas:
    """Bytes of every account over the counted steps, stacked."""

    title: str
    note: str
    samples: Sequence[Mapping[str, int]]
    bands: Sequence[Band]
    peak: int
    """Index of the highest sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Curves over optimizer steps; a value that is None is a gap."""

    title: str
    note: str
    series: Sequence[tuple[str, Sequence[tuple[float, float | None]]]]


Figure = Bars | Areas | Lines


def key_title(key: str) -> str:
    """A segment's key as the legend says it."""
    return _TITLES.get(key) or account_title(key)


def figures(report: Report) -> list[Figure]:
    """The pictures of a report, in the order of the page; those without data are left out."""
    makers: dict[str, Sequence[Callable[[Report], Figure | None]]] = {
        "compare": (_stacks, _speeds, _stack_losses),
        "plan": (_plan, _waterfall, _device_range, _owners),
        "profile": (_sources, _waterfall, _over_time, _owners, _losses, _step_times),
        "train": (_sources, _waterfall, _over_time, _owners, _losses),
    }
    made = (make(report) for make in makers[report["kind"]])
    return [figure for figure in made if figure is not None]


# ---------------------------------------------------------------- bars


def _of_accounts(label: str, accounts: Mapping[str, int] | None) -> Bar | None:
    if accounts is None:
        return None
    segments = [(name, accounts[name]) for name in ACCOUNTS]
    return Bar(label=label, segments=segments, text=format_bytes(sum(accounts.values())))


def _of_total(label: str, num_bytes: int | None) -> Bar | None:
    if num_bytes is None:
        return None
    return Bar(label=label, segments=[(TOTAL, num_bytes)], text=format_bytes(num_bytes))


def _sources(report: Report) -> Bars | None:
    """Predicted, counted, allocator, driver: the peak as each of them sees it."""
    monitor = report["monitor"] or {}
    allocator = (monitor.get("allocator") or {}).get("peak_allocated_bytes")
    bars = [
        _of_accounts("predicted", (report["predicted"] or {}).get("accounts")),
        _of_accounts("counted", report["accounts"]),
        _of_total("allocator", allocator),
        _of_total("NVML", monitor.get("process_peak_bytes")),
        _of_total("RSS, by how much it grew", _grown(monitor)),
    ]
    shown = [bar for bar in bars if bar is not None]
    if not shown:
        return None
    return Bars(
        title="The peak, by everyone who looked",
        note="Predicted by the plan and counted by the ledger, by account; the others see one sum, "
        "with what is not a tensor: the allocator's cache, the CUDA context, library buffers.",
        bars=shown,
    )


def _grown(monitor: Report) -> int | None:
    """Of a CPU run; on a GPU the host holds other things than the device."""
    before: int | None = (monitor.get("baseline") or {}).get("rss_bytes")
    peak: int | None = monitor.get("rss_peak_bytes")
    on_gpu = monitor.get("allocator") is not None or monitor.get("process_peak_bytes") is not None
    if before is None or peak is None or on_gpu:
        return None
    return max(0, peak - before)


def _plan(report: Report) -> Bars:
    bars = [
        _of_accounts("at the peak", report["accounts"]),
        *(
            Bar(label=account_title(name), segments=[(name, value)], text=format_bytes(value))
            for name, value in report["account_maxima"].items()
        ),
    ]
    return Bars(
        title="The peak by account, and each account's own maximum",
        note="The maxima come at different instants, so that they add up to more than the peak.",
        bars=[bar for bar in bars if bar is not None],
    )


def _waterfall(report: Report) -> Bars | None:
    """The peak with one strategy after the other; what each took away is drawn to its right."""
    rows = report.get("waterfall") or (report.get("predicted") or {}).get("waterfall")
    rows = rows or _of_ablation(report.get("ablation") or [])
    if not any(row["peak_bytes"] is not None for row in rows):
        return None
    measured = any(row.get("measured_peak_bytes") is not None for row in rows)
    stuck = any(row["peak_bytes"] is None for row in rows)
    return Bars(
        title="What every strategy saves",
        note="From no strategy to all of them, in the order in which they are attached, each with "
        "those above it. What one saves depends on that order; the table has what the whole stack "
        "would take more without it."
        + (" The dashed line is the peak that was measured." if measured else "")
        + (" A stack that cannot run has no bar; the table says why." if stuck else ""),
        bars=[_of_step(row, first=index == 0) for index, row in enumerate(rows)],
        mark="measured" if measured else "",
    )


def _of_ablation(rows: Sequence[Report]) -> list[dict[str, Any]]:
    """The predicted waterfall of a run that measured each stack too: the allocator's peak on CUDA,
    else the ledger's."""
    return [
        {
            **row["predicted"],
            "strategy": row["strategy"],
            "measured_peak_bytes": (row["allocated"] or row["counted"])["peak_bytes"],
        }
        for row in rows
    ]


def _of_step(row: Report, *, first: bool) -> Bar:
    peak, step, measured = row["peak_bytes"], row["step_bytes"], row.get("measured_peak_bytes")
    label = "no strategy" if first else f"+ {row['strategy']}"
    if peak is None:
        return Bar(label=label, segments=[], text="cannot run so", mark=measured)
    text = format_bytes(peak)
    segments: list[tuple[str, float]] = [(TOTAL, peak)]
    if step:
        key, sign = (SAVED, "−") if step > 0 else (ADDED, "+")
        segments = [(TOTAL, peak - max(0, -step)), (key, abs(step))]
        text = f"{text} ({sign}{format_bytes(abs(step))})"
    if measured is not None:
        text = f"{text}, measured {format_bytes(measured)}"
    return Bar(label=label, segments=segments, text=text, mark=measured)


def _device_range(report: Report) -> Bars:
    bars = [
        _of_total("tensors", report["rounded_peak_bytes"]),
        *(_of_total(name, value) for name, value in report["device_bytes"].items()),
    ]
    gpu = report.get("gpu")
    if gpu is not None:
        bars.append(_of_total(f"the card ({gpu['text']})", gpu["total_bytes"]))
    return Bars(
        title="On a GPU",
        note="Tensors, and with fragmentation, CUDA context and cuBLAS: low, expected, high.",
        bars=[bar for bar in bars if bar is not None],
    )


def _owners(report: Report) -> Bars | None:
    owners = report["owners"]
    if not owners:
        return None
    largest = sorted(owners.items(), key=lambda item: -item[1])
    bars = [_of_total(name or "outside modules", value) for name, value in largest[:_MAX_OWNERS]]
    rest = largest[_MAX_OWNERS:]
    if rest:
        bars.append(_of_total(f"{len(rest)} others", sum(value for _, value in rest)))
    return Bars(
        title="Who holds the bytes at the peak",
        note="Owners are strategies, and modules with the layers' numbers folded to a star.",
        bars=[bar for bar in bars if bar is not None],
    )


def _stacks(report: Report) -> Bars | None:
    bars = [_of_accounts(run["stack"], run["accounts"]) for run in _done(report)]
    shown = [bar for bar in bars if bar is not None]
    if not shown:
        return None
    return Bars(
        title="Memory at the peak",
        note="As the ledger counted it, by account.",
        bars=shown,
    )


def _speeds(report: Report) -> Bars | None:
    bars = [
        Bar(
            label=run["stack"],
            segments=[(TOTAL, run["tokens_per_second"])],
            text=f"{run['tokens_per_second']:,.0f}",
        )
        for run in _done(report)
    ]
    if not bars:
        return None
    return Bars(title="Tokens per second", note="Without the ledger.", bars=bars, in_bytes=False)


def _done(report: Report) -> Iterator[Report]:
    return (run for run in report["runs"] if run["status"] == "ok")


# ---------------------------------------------------------------- over time


def _over_time(report: Report) -> Areas | None:
    samples = report.get("timeline") or []
    if not samples or "accounts" not in samples[0]:
        return None  # of an earlier version, which had no accounts here
    bands: list[Band] = []
    for index, sample in enumerate(samples):
        last = bands[-1] if bands else None
        if last is not None and (last.step, last.phase) == (sample["step"], sample["phase"]):
            bands[-1] = Band(step=last.step, phase=last.phase, begin=last.begin, end=index)
        else:
            bands.append(Band(step=sample["step"], phase=sample["phase"], begin=index, end=index))
    heights = [sample["bytes"] for sample in samples]
    return Areas(
        title="Accounts over the counted steps",
        note="From left to right in the order of the run, one point for some allocations each, so "
        "a phase is as wide as it allocates often. Every point is the highest of its stretch.",
        samples=[sample["accounts"] for sample in samples],
        bands=bands,
        peak=heights.index(max(heights)),
    )


def _curve(values: Sequence[Any]) -> list[tuple[float, float | None]]:
    """Points of losses that are numbers (one a step) or dictionaries with their step."""
    points = []
    for index, value in enumerate(values):
        step, loss = (
            (value["step"], value["loss"]) if isinstance(value, Mapping) else (index + 1, value)
        )
        points.append((float(step), loss if loss is not None and math.isfinite(loss) else None))
    return points


def _losses(report: Report) -> Lines | None:
    series = [
        (name, _curve(report.get(key) or []))
        for name, key in (("training", "losses"), ("evaluation", "evaluation_losses"))
    ]
    return _lines("Loss", "Over optimizer steps.", series)


def _stack_losses(report: Report) -> Lines | None:
    series = [(run["stack"], _curve(run.get("losses") or [])) for run in _done(report)]
    return _lines("Training loss of every stack", "Over optimizer steps.", series)


def _step_times(report: Report) -> Lines | None:
    seconds = report.get("step_seconds") or []
    first = len(report.get("losses") or []) - len(seconds) + 1
    points = [(float(first + index), value) for index, value in enumerate(seconds)]
    return _lines("Seconds of a step", "Optimizer steps without the ledger.", [("seconds", points)])


def _lines(
    title: str, note: str, series: Sequence[tuple[str, Sequence[tuple[float, float | None]]]]
) -> Lines | None:
    """None where no curve has two points to join."""
    drawn = [(name, points) for name, points in series if points]
    if not any(sum(y is not None for _, y in points) > 1 for _, points in drawn):
        return None
    return Lines(title=title, note=note, series=drawn)


# ---------------------------------------------------------------- scales


def ticks(low: float, high: float, *, in_bytes: bool, count: int = 4) -> list[tuple[float, str]]:
    """About `count` round values from `low` to the first above `high`, with their labels."""
    unit, size = "", 1
    if in_bytes:
        unit, size = [each for each in _UNITS if high >= each[1]][-1] if high >= 1 else _UNITS[0]
    span = (high - low) / size or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / size / step), math.ceil(high / size / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [
        (index * step * size, f"{index * step:,.{digits}f} {unit}".strip())
        for index in range(first, max(last, first + 1) + 1)
    ]
