"""The sections of a profile: predicted, counted, allocator and driver side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memrt.profiling.accounts import Account
from memrt.profiling.render import Column, Section
from memrt.profiling.render_sections import (
    account_title,
    bytes_table,
    conditions_section,
    device_section,
    places_section,
    top_section,
)
from memrt.profiling.report import format_bytes

__all__ = ["driver_section", "profile_sections"]

Report = Mapping[str, Any]

_MONITORED = ("forward", "backward", "step")


def profile_sections(report: Report) -> list[Section]:
    """What `memrt profile` shows."""
    return [
        _accounts(report),
        *_ablation_sections(report),
        _phases(report),
        _outside_section(report),
        _speed(report),
        places_section(report),
        device_section(report),
        top_section(report),
        conditions_section(report["conditions"]),
    ]


def _ablation_sections(report: Report) -> list[Section]:
    """What every strategy saves, predicted and measured, if it was asked."""
    found = report.get("ablation")
    if not found:
        return []
    sources = ["predicted", "counted"]
    titles = {"predicted": "predicted", "counted": "counted", "allocated": "allocator"}
    if all(row["allocated"] is not None for row in found):
        sources.append("allocated")
    sections = []
    for number, title, first in (
        ("peak_bytes", "The peak, one strategy after the other", "with"),
        ("saved_bytes", "What the stack takes more without it", "without"),
    ):
        rows = [
            [row["strategy"], *(row[s][number] for s in sources), row["difference_bytes"][number]]
            for row in found
            if number == "peak_bytes" or row["strategy"] != "none"
        ]
        columns = [
            Column(title=first),
            *(Column(title=titles[source], kind="bytes") for source in sources),
            Column(title="counted - predicted", short="diff.", kind="bytes"),
        ]
        table = bytes_table(columns, rows)
        sections.append(Section(title=f"{title} ({table.unit})", table=table))
    reasons = [f"- {row['strategy']}: {row['reason']}" for row in found if row["reason"]]
    if reasons:
        sections.append(Section(after=["\n".join(reasons)]))
    return sections


def _watched_peak(monitor: Report, column: str) -> int | None:
    """The largest of a phase column over the steps without the ledger."""
    found = [
        phase[column]
        for name, phase in monitor["phases"].items()
        if name in _MONITORED and phase[column] is not None
    ]
    return max(found) if found else None


def _accounts(report: Report) -> Section:
    predicted, monitor = report["predicted"], report["monitor"]
    columns = [Column(title="at the peak")]
    notes: list[str] = []
    rows: list[list[Any]] = [[account_title(account.value)] for account in Account] + [["peak"]]
    for title, source in (("predicted", predicted), ("counted", report)):
        if source is None:
            notes.append(f"predicted: not available: {report['not_predicted']}.")
            continue
        columns.append(Column(title=title, kind="bytes"))
        values = [*(source["accounts"][account.value] for account in Account), source["peak_bytes"]]
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    for title, value, reason in (
        ("allocator", _watched_peak(monitor, "allocated_peak_bytes"), "allocator"),
        ("NVML", monitor["process_peak_bytes"], "nvml"),
        ("RSS", _watched_peak(monitor, "rss_peak_bytes"), ""),
    ):
        if value is None:
            why = monitor["unavailable"].get(reason, "no reading fell into the run")
            notes.append(f"{title}: not available: {why}.")
            continue
        columns.append(Column(title=title, kind="bytes"))
        for row in rows:
            row.append(value if row[0] == "peak" else None)
    table = bytes_table(columns, rows)
    region = report["region"]
    where = f" in {region['module']}" if region["module"] else ""
    planned = "" if predicted is None else "Predicted: memrt plan at the same shapes. "
    return Section(
        title=f"memrt profile: {report['conditions']['model']}, {report['stack']}",
        before=[
            f"Bytes in {table.unit}. The peak, {format_bytes(report['peak_bytes'])}, comes in "
            f"{region['phase']}{where}. {planned}Counted: the ledger over the first 2 steps. The "
            "others saw the steps after them."
        ],
        table=table,
        after=["\n".join(notes)] if notes else [],
    )


def _phases(report: Report) -> Section:
    monitored = report["monitor"]["phases"]
    seen = {
        "allocator": "allocated_peak_bytes",
        "NVML device": "device_used_peak_bytes",
        "RSS": "rss_peak_bytes",
    }
    sources = {
        "predicted": (report["predicted"] or {}).get("phases", {}),
        "counted": report["phases"],
        **{
            title: {name: phase[key] for name, phase in monitored.items()}
            for title, key in seen.items()
        },
    }
    shown = [
        title
        for title, phases in sources.items()
        if any(each is not None for each in phases.values())
    ]
    names = [*report["phases"], *(name for name in _MONITORED if name not in report["phases"])]
    rows = [[name, *(sources[title].get(name) for title in shown)] for name in names]
    columns = [Column(title="phase"), *(Column(title=title, kind="bytes") for title in shown)]
    table = bytes_table(columns, rows)
    return Section(title=f"Peak of every phase ({table.unit})", table=table)


def _outside_section(report: Report) -> Section:
    """The lines that sum to what was seen from outside: of the driver, the allocator, or RSS."""
    if report["monitor"]["at_peak"]:
        return driver_section(report)
    on_gpu = report["monitor"].get("allocator") is not None
    return _reserved(report) if on_gpu else _host(report)


def driver_section(report: Report) -> Section:
    """Lines that sum to what nvidia-smi shows."""
    split = report["monitor"]["at_peak"]
    counted = report["peak_bytes"]
    rows = [[account_title(a.value), report["accounts"][a.value]] for a in Account]
    rows.append(["rounding, kernel scratch", split["allocated_bytes"] - counted])
    rows.append(["cached and fragmented", split["cached_bytes"]])
    others = split["other_processes_bytes"]
    unknown = split["scope"] == "device" and others is None
    context = "CUDA context and libraries"
    rows.append(
        [f"{context}, other processes" if unknown else context, split["context_and_other_bytes"]]
    )
    if others is not None:
        rows.append(["other processes and driver", others])
    if split["shortfall_bytes"]:
        rows.append(["read at different instants", -split["shortfall_bytes"]])
    rows.append([f"what nvidia-smi shows ({split['scope']})", split["nvml_bytes"]])
    table = bytes_table([Column(title="line"), Column(title="bytes", kind="bytes")], rows)
    return Section(
        title=f"Lines that sum to what nvidia-smi shows ({table.unit})",
        table=table,
        after=list(split["flags"]),
    )


def _reserved(report: Report) -> Section:
    """Lines that sum to what torch reserves on a GPU whose driver told nothing."""
    monitor, counted = report["monitor"], report["peak_bytes"]
    allocated = monitor["allocator"]["peak_allocated_bytes"]
    reserved = monitor["allocator"]["peak_reserved_bytes"]
    rows = [[account_title(a.value), report["accounts"][a.value]] for a in Account]
    rows.append(["rounding, kernel scratch", allocated - counted])
    rows.append(["cached and fragmented", reserved - allocated])
    rows.append(["reserved by torch's allocator", reserved])
    table = bytes_table([Column(title="line"), Column(title="bytes", kind="bytes")], rows)
    reason = monitor["unavailable"].get("nvml", "no reading fell into the run")
    return Section(
        title=f"Lines that sum to what torch reserves ({table.unit})",
        before=[
            f"What nvidia-smi shows is not available: {reason}. It is more, by the CUDA context, "
            "libraries and other processes."
        ],
        table=table,
    )


def _host(report: Report) -> Section:
    """Lines that sum to the resident set size, of a run on the CPU."""
    monitor = report["monitor"]
    before = monitor["baseline"]["rss_bytes"]
    peak = _watched_peak(monitor, "rss_peak_bytes") or monitor["rss_peak_bytes"]
    counted = report["peak_bytes"] + sum(
        num_bytes for place, num_bytes in report["place_peaks"].items() if place == "host"
    )
    rows = [
        ["before the model was loaded (Python, libraries, data)", before],
        ["counted by the ledger, device and host", counted],
        ["the rest (library buffers, what malloc keeps, kernel scratch)", peak - before - counted],
        ["largest resident set size (RSS)", peak],
    ]
    table = bytes_table([Column(title="line"), Column(title="bytes", kind="bytes")], rows)
    return Section(
        title=f"Lines that sum to this process's memory ({table.unit})",
        before=["No NVML here, so this is host memory as the operating system counts it."],
        table=table,
    )


def _speed(report: Report) -> Section:
    lines = [
        f"- tokens/s without the ledger: {report['tokens_per_second']:,.0f}",
        f"- loss: {report['loss']:.3f} (mean over the last 3 optimizer steps)",
    ]
    energy = report["joules_per_token"]
    if energy is None:
        reason = report["monitor"]["unavailable"].get("energy_joules", "no energy was read")
        lines.append(f"- energy per token: not available: {reason}")
    else:
        source = report["monitor"]["energy_source"]
        lines.append(f"- energy per token: {energy * 1000:.2f} mJ ({source})")
    scratch = report["kernel_scratch"]
    if scratch is not None:
        largest = format_bytes(scratch["largest_bytes"])
        lines.append(
            f"- kernel scratch: at most {largest} inside one operator ({scratch['operator']}); it "
            "is in no account, torch's profiler alone sees it"
        )
    return Section(title="Speed", before=["\n".join(lines)])
