"""The sections of a plan: accounts, what to choose or change, work of a step, places, the card.

Reports of earlier versions lack some of it; what is not there is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from memrt.profiling.accounts import Account
from memrt.profiling.render import Column, Section
from memrt.profiling.render_outside import outside_sections
from memrt.profiling.render_sections import (
    account_title,
    bytes_table,
    conditions_section,
    device_section,
    phases_section,
    places_section,
    top_section,
)
from memrt.profiling.report import format_bytes

__all__ = ["plan_sections", "waterfall_sections"]

Report = Mapping[str, Any]

_ACCOUNTS = [account.value for account in Account]


def plan_sections(report: Report) -> list[Section]:
    """What `memrt plan` shows."""
    rows = [
        [account_title(name), report["accounts"][name], report["account_maxima"][name]]
        for name in _ACCOUNTS
    ]
    rows.append(["peak", report["peak_bytes"], report["peak_bytes"]])
    columns = [
        Column(title="account"),
        Column(title="at the peak", kind="bytes"),
        Column(title="largest", kind="bytes"),
    ]
    accounts = bytes_table(columns, rows)
    layers = _layers_text(report)
    return [
        Section(
            title=f"memrt plan: {report['conditions']['model']}, {report['stack']}",
            before=[_plan_headline(report), f"Bytes in {accounts.unit}."],
            table=accounts,
        ),
        *_auto_sections(report),
        *_advice_sections(report),
        *waterfall_sections(report),
        *_work_sections(report),
        phases_section(report),
        *outside_sections(report),
        _places(report),
        device_section(report),
        top_section(report),
        Section(after=[f"Planned in {report['seconds']:.1f} s; {layers}."]),
        conditions_section(report["conditions"]),
    ]


def _plan_headline(report: Report) -> str:
    conditions, region = report["conditions"], report["region"]
    where = f" in {region['module']}" if region["module"] else ""
    windows = conditions["accumulation_steps"]
    accumulated = f" × {windows} micro-batches" if windows > 1 else ""
    return (
        f"{conditions['batch_size']} × {conditions['sequence_length']} tokens{accumulated}, "
        f"{conditions['dtype']}. The peak, {format_bytes(report['peak_bytes'])}, comes in "
        f"{region['phase']}{where}."
    )


def _layers_text(report: Report) -> str:
    simulated = report["simulated_layers"]
    total = report["num_layers"]
    if not simulated or list(simulated) == [total]:
        return f"all {total} layers simulated" if total else "every module simulated"
    depths = ", ".join(map(str, simulated))
    return f"simulated {depths} layers deep and carried to {total}"


def waterfall_sections(report: Report) -> list[Section]:
    """What every strategy saves, if it was asked."""
    found = report.get("waterfall")
    if not found:
        return []
    keys = ["step_bytes", "peak_bytes", "measured_peak_bytes", "saved_bytes"]
    titles = ["lowers the peak by", "to", "measured", "the stack without it takes more by"]
    if all(each.get("measured_peak_bytes") is None for each in found):
        del keys[2], titles[2]
    rows = [[each["strategy"], *(each.get(key) for key in keys)] for each in found]
    columns = [
        Column(title="with, one after the other"),
        *(Column(title=title, kind="bytes") for title in titles),
    ]
    table = bytes_table(columns, rows)
    reasons = [f"- {each['strategy']}: {each['reason']}" for each in found if each["reason"]]
    return [
        Section(
            title=f"What every strategy saves ({table.unit})",
            table=table,
            after=["\n".join(reasons)] if reasons else [],
        )
    ]


def _auto_sections(report: Report) -> list[Section]:
    """Which stack was chosen and why not another, if it was asked."""
    auto = report.get("auto")
    if not auto:
        return []
    stack = report["stack"]
    verdict = f"{stack}: {auto['rung']}." if auto["fits"] else f"Nothing fits; least: {stack}."
    rejected = [f"- {sentence}" for sentence in auto["rejected"]]
    chosen = [f"- {reason}" for reason in auto["reasons"]]
    return [
        Section(
            title="The choice",
            before=["\n".join([verdict, *chosen])],
            after=["\n".join(rejected)] if rejected else [],
        ),
        *_remedies(auto["remedies"]),
        Section(after=[f"{auto['assumptions']}."]),
    ]


def _advice_sections(report: Report) -> list[Section]:
    """What would make it fit."""
    if report.get("advice") is None:
        return []
    held = sorted(report["accounts"].items(), key=lambda item: -item[1])[:2]
    largest = ", ".join(f"{account_title(name)} {format_bytes(size)}" for name, size in held)
    return _remedies(report["advice"], before=[f"The largest accounts at the peak: {largest}."])


def _remedies(remedies: Any, before: Any = ()) -> list[Section]:
    if not remedies and not before:
        return []
    lines = []
    for each in remedies:
        needed = each["device_bytes"]
        room = "" if needed is None else f": up to {format_bytes(needed)}"
        if each["pinned_bytes"]:
            room += f" and {format_bytes(each['pinned_bytes'])} pinned on the host"
        lines.append(f"- {each['change']}{room}{'' if each['fits'] else ', which does not fit'}")
    return [Section(title="What to change", before=[*before, "\n".join(lines)])]


def _work_sections(report: Report) -> list[Section]:
    """FLOPs and transfers of an optimizer step."""
    if report.get("flops") is None:
        return []
    phases = ", ".join(
        f"{name} {flops / 1e12:,.4g}" for name, flops in report["flops_by_phase"].items()
    )
    lines = [f"- arithmetic: {report['flops'] / 1e12:,.4g} TFLOP ({phases})"]
    if report["first_step_flops"] != report["flops"]:
        lines.append(f"- of the first step: {report['first_step_flops'] / 1e12:,.4g} TFLOP")
    moved = ", ".join(f"{name} {format_bytes(n)}" for name, n in report["transfers"].items())
    lines.append(f"- transfers: {moved or 'none'}")
    if report["uncounted_operators"]:
        lines.append(f"- not counted: {', '.join(report['uncounted_operators'])}")
    return [Section(title="Work of an optimizer step", before=["\n".join(lines)])]


def _places(report: Report) -> Section:
    """Where the bytes lie, how much of the host is pinned, and whether the host has it."""
    section = places_section(report)
    host = report.get("host_bytes")
    if host is None:
        return section
    lines = []
    if host["pinned"]:
        lines.append(
            f"On CUDA what waits on the host is pinned, in blocks of powers of two: "
            f"{format_bytes(host['pinned'])}."
        )
    if report["disk_bytes"]:
        lines.append("On the disk: temporary files in TMPDIR.")
    if report["host"] is not None:
        verdict = "fits" if report["fits_host"] else "does not fit"
        lines.append(
            f"It {verdict} {report['host']['text']} of host memory; Python, its libraries and the "
            "data are not counted."
        )
    return replace(section, after=[*section.after, " ".join(lines)] if lines else section.after)
