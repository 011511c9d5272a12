"""From the parts' files to one record and its tables; reads JSON only, so it runs anywhere.

What is judged: that every check on the device passed and every strategy did somewhere, that the
plan's *expected* device bytes are within 5 % of what NVML shows in 90 % of the runs and within 10 %
in all, that its *high* is never below, and where the 70B part ran, its bounds
(`benchmarks.gpu.summary_70b`). On the CPU there is nothing to judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from statistics import median
from typing import Any

from benchmarks.gpu import summary_70b
from benchmarks.gpu.tables import GIB, aligned, gib, number, own_bytes
from benchmarks.record import commit, cores, cpu_model, dirty, make_record

__all__ = ["CLAIM", "GOAL", "compare", "record", "text"]

CLAIM = (
    "On a CUDA device every strategy trains right, and a plan tells what the allocator and NVML "
    "will show."
)
GOAL = (
    "every check passes; expected device bytes within 5 % of NVML in 90 % of the runs and 10 % in "
    "all, high never below"
)
CLOSE, FAR = 0.05, 0.10
CLOSE_SHARE = 0.9

_CHECKED = ("correctness", "operators", "tests", "kernels", "seventy_b")
_BAD = {"failed", "error", "crashed", "device lost", "time out"}
_ABSENT = "not installed"

Contents = Mapping[str, Mapping[str, Any]]


def compare(row: Mapping[str, Any], planned: Mapping[str, Any] | None) -> dict[str, Any]:
    """A measured row beside its plan; None for what one of them lacks."""
    allocated = row.get("allocated") or {}
    own = own_bytes(row["driver"])
    found = {
        "size": row["size"],
        "stack": row["stack"],
        "counted_bytes": row["peak_bytes"],
        "counted_rounded_bytes": row["rounded_peak_bytes"],
        "allocated_counted_bytes": allocated.get("counted_peak_bytes"),
        "allocated_bytes": allocated.get("full_speed_peak_bytes"),
        "reserved_bytes": allocated.get("peak_reserved_bytes"),
        "process_bytes": own,
        "process_source": row["driver"]["process_source"],
        "tokens_per_second": row["tokens_per_second"],
        "joules_per_token": row["joules_per_token"],
    }
    if planned is None or planned.get("status") != "ok":
        return {**found, "predicted_bytes": None}
    rounded, device = planned["rounded_peak_bytes"], planned["device_bytes"]
    return {
        **found,
        "predicted_bytes": planned["peak_bytes"],
        "predicted_rounded_bytes": rounded,
        "expected_device_bytes": device["expected"],
        "high_device_bytes": device["high"],
        "plan_equals_ledger": planned["peak_bytes"] == row["peak_bytes"]
        and planned["accounts"] == row["accounts"],
        "plan_to_ledger": planned["peak_bytes"] / row["peak_bytes"],
        "plan_to_allocated_counted": _ratio(rounded, found["allocated_counted_bytes"]),
        "plan_to_allocated": _ratio(rounded, found["allocated_bytes"]),
        "expected_to_process": _ratio(device["expected"], own),
        "high_covers_process": None if own is None else device["high"] >= own,
    }


def _ratio(one: int, other: int | None) -> float | None:
    return None if not other else one / other


def _rows(contents: Contents, part: str) -> Mapping[str, Mapping[str, Any]]:
    rows: Mapping[str, Mapping[str, Any]] = contents.get(part, {}).get("rows", {})
    return rows


def _checks(contents: Contents) -> dict[str, Any]:
    """Counts of every checked part, and what did not pass."""
    found: dict[str, Any] = {}
    for part in _CHECKED:
        rows = _rows(contents, part)
        found[part] = {
            "counts": dict(Counter(row["status"] for row in rows.values())),
            "not_passed": {
                key: f"{row['status']}: {row.get('reason')}"
                for key, row in rows.items()
                if row["status"] in _BAD
            },
        }
    return found


def _never_passed(contents: Contents) -> dict[str, str]:
    """Strategies that passed on no family, with a reason; not those whose package is missing."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in _rows(contents, "correctness").values():
        stack = row.get("stack", "none")
        if stack != "none" and "+" not in stack:
            by_name.setdefault(stack, []).append(row)
    return {
        name: str(rows[0].get("reason"))
        for name, rows in by_name.items()
        if len(rows) > 1  # the tiny scale tries one family
        and not any(row["status"] == "passed" for row in rows)
        and not all(_ABSENT in str(row.get("reason")) for row in rows)
    }


def _memory(contents: Contents) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Compared rows, and the reasons of those that did not run."""
    plans = _rows(contents, "plans")
    rows = _rows(contents, "memory")
    compared = [compare(row, plans.get(key)) for key, row in rows.items() if row["status"] == "ok"]
    absent = {
        key: f"{row['status']}: {row.get('reason')}"
        for key, row in rows.items()
        if row["status"] != "ok"
    }
    return compared, absent


def _speed(contents: Contents) -> list[dict[str, Any]]:
    """Every variant over its rounds, beside the plain loop."""
    by_variant: dict[str, list[Mapping[str, Any]]] = {}
    for row in _rows(contents, "speed").values():
        if row["status"] == "ok":
            by_variant.setdefault(row["variant"], []).append(row)
    rows = [
        {
            "variant": variant,
            "tokens_per_second": median([each["tokens_per_second"] for each in rounds]),
            "rounds": [each["tokens_per_second"] for each in rounds],
            "joules_per_token": _median([each["joules_per_token"] for each in rounds]),
            "peak_allocated_bytes": rounds[0]["peak_allocated_bytes"],
        }
        for variant, rounds in by_variant.items()
    ]
    base = rows[0]["tokens_per_second"] if rows else None
    return [{**row, "relative_speed": row["tokens_per_second"] / base} for row in rows]


def _updates(contents: Contents) -> list[dict[str, Any]]:
    """What the optimizer's side of a step takes, variant by variant."""
    found = []
    for key, row in _rows(contents, "updates").items():
        if row["status"] != "ok":
            found.append({"case": key, "reason": f"{row['status']}: {row.get('reason')}"})
            continue
        times = row.get("median_seconds") or {
            label: each["amortised_whole_seconds"]
            for label, each in row["variants_amortised"].items()
        }
        names = ("fp8_share_of_copy", "fp8_to_fp32_moments", "bound", "update_seconds_of_32_layers")
        kept = {name: row[name] for name in names if name in row}
        found.append({"case": key, "seconds": times, **kept})
    return found


def _kernels(contents: Contents) -> list[dict[str, Any]]:
    """Seconds of each kernel's call, beside plain PyTorch's, and its share of the card's copies."""
    return [
        {
            "kernel": key,
            "seconds": row["seconds_of_call"],
            "plain_seconds": row["plain_seconds"],
            "share_of_copy": row["share_of_copy"],
        }
        for key, row in _rows(contents, "kernels").items()
        if row["status"] == "ok"
    ]


def _kernel_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Milliseconds, and the share of what the card copies in a second."""
    yield from aligned(
        [
            ("kernel", "ms", "plain ms", "share of copy"),
            *(
                (
                    row["kernel"],
                    number(1000 * row["seconds"], ".3f"),
                    "-" if row["plain_seconds"] is None else f"{1000 * row['plain_seconds']:.3f}",
                    number(row["share_of_copy"], ".2f"),
                )
                for row in rows
            ),
        ]
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _constants(contents: Contents) -> dict[str, Any]:
    part = contents.get("constants", {})
    names = ("workspace_bytes", "context_and_other_bytes", "reserved_bytes")
    rows = {
        key: {name: row.get(name) for name in names}
        for key, row in _rows(contents, "constants").items()
        if row["status"] == "ok"
    }
    kept = ("rounding", "host", "capability", "driver_version", "nvml_unavailable")
    return {"after": rows, **{name: part.get(name) for name in kept}}


def _judgement(
    checks: Mapping[str, Any],
    memory: Sequence[Mapping[str, Any]],
    unfinished: Sequence[str],
    never: Mapping[str, str],
    large: Mapping[str, Any],
) -> tuple[bool | None, str]:
    """Whether the goal is met, and why."""
    failed = sum(len(part["not_passed"]) for part in checks.values())
    passed = sum(part["counts"].get("passed", 0) for part in checks.values())
    errors = [
        abs(row["expected_to_process"] - 1) for row in memory if row.get("expected_to_process")
    ]
    above = [row for row in memory if row.get("high_covers_process") is False]
    reason = f"{passed} checks passed, {failed} did not"
    if unfinished:
        reason += f"; not finished: {', '.join(unfinished)}"
    if never:
        reason += f"; passed nowhere: {', '.join(never)}"
    if large:
        reason += f"; {large['reason']}"
    if not errors:
        return None, f"{reason}; no plan was compared with NVML"
    close = sum(error <= CLOSE for error in errors) / len(errors)
    reason += (
        f"; expected device bytes within 5 % of NVML in {close:.0%} of {len(errors)} runs, at most "
        f"{max(errors):.1%} off; {len(above)} above the high bound"
    )
    met = close >= CLOSE_SHARE and max(errors) <= FAR and not above
    met = met and large.get("met") is not False
    return met and not failed and not unfinished and not never, reason


def record(
    contents: Contents,
    parts: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    device: str,
    scale: str,
) -> dict[str, Any]:
    """Everything as one record of the benchmarks' form."""
    checks = _checks(contents)
    memory, absent = _memory(contents)
    unfinished = sorted({part["part"] for part in parts if part["exit_code"] != 0})
    never = _never_passed(contents)
    large = summary_70b.section(_rows(contents, "seventy_b"), _rows(contents, "plans"), compare)
    measured = [*memory, *large.get("rows", [])]
    met, reason = _judgement(checks, measured, unfinished, never, large)
    if device != "cuda":
        met, reason = None, f"run on the CPU, so nothing here is a GPU's; {reason}"
    return make_record(
        name="gpu",
        claim=CLAIM,
        goal=GOAL,
        found=_conditions(contents, device=device, scale=scale),
        outcome={
            "summary": {
                "parts": list(parts),
                "seconds": seconds,
                "checks": checks,
                "never_passed": never,
                "seventy_b": large,
                "memory": memory,
                "memory_not_run": absent,
                "speed": _speed(contents),
                "updates": _updates(contents),
                "kernels": _kernels(contents),
                "constants": _constants(contents),
            },
            "repetitions": dict(contents) or {"none": "no part wrote a file"},
            "met": met,
            "reason": reason,
        },
    )


def _conditions(contents: Contents, *, device: str, scale: str) -> dict[str, Any]:
    """What a part found on the device; this process has not looked."""
    constants = contents.get("constants", {})
    named = {part["device"] for part in contents.values() if "device" in part} - {"cpu"}
    found = constants.get("conditions") or {
        # the plans are made on the CPU everywhere
        "device": "cpu" if device == "cpu" else ", ".join(sorted(named)) or "unknown",
        "cpu": cpu_model(),
        "cores": cores(),
        "packages": {},
        "commit": commit(),
        "dirty": dirty(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return {
        **found,
        "driver_version": constants.get("driver_version"),
        "configuration": {"device": device, "scale": scale},
    }


# ---------------------------------------------------------------- tables for people


def _memory_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """GiB of the plan, the ledger, the allocator and the driver."""
    header = (
        *("model, stack", "plan", "ledger", "allocated", "plan/alloc", "reserved"),
        *("expected", "NVML", "exp/NVML", "high", "tok/s"),
    )
    yield from aligned(
        [
            header,
            *(
                (
                    f"{row['size']} {row['stack']}",
                    gib(row.get("predicted_rounded_bytes")),
                    ("=" if row.get("plan_equals_ledger") else "") + gib(row["counted_bytes"]),
                    gib(row["allocated_bytes"]),
                    number(row.get("plan_to_allocated"), ".4f"),
                    gib(row["reserved_bytes"]),
                    gib(row.get("expected_device_bytes")),
                    gib(row["process_bytes"]),
                    number(row.get("expected_to_process"), ".4f"),
                    gib(row.get("high_device_bytes")),
                    number(row["tokens_per_second"], ",.0f"),
                )
                for row in rows
            ),
        ]
    )


def _speed_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each variant beside the plain loop: GiB and its difference, tokens a second, energy."""
    base = rows[0]["peak_allocated_bytes"]
    yield from aligned(
        [
            ("variant", "GiB", "Δ GiB", "tok/s", "Δ %", "J/1000 tokens"),
            *(
                (
                    row["variant"],
                    gib(row["peak_allocated_bytes"]),
                    "-"
                    if None in (base, row["peak_allocated_bytes"])
                    else f"{(row['peak_allocated_bytes'] - base) / GIB:+.2f}",
                    number(row["tokens_per_second"], ",.0f"),
                    f"{100 * (row['relative_speed'] - 1):+.1f}",
                    "-"
                    if row["joules_per_token"] is None
                    else f"{1000 * row['joules_per_token']:.1f}",
                )
                for row in rows
            ),
        ]
    )


def _update_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """Milliseconds of every variant, then what the goals are about."""
    for label, seconds in row.get("seconds", {}).items():
        yield f"  {label}: {1000 * seconds:.2f} ms"
    for name, value in row.items():
        if name not in ("case", "seconds", "reason"):
            yield f"  {name.replace('_', ' ')}: {value:.3f}"


def text(record: Mapping[str, Any]) -> str:
    """The record for a terminal."""
    summary, where = record["summary"], record["conditions"]
    lines = [f"\n{where['device']}, driver {where['driver_version']}, commit {where['commit']}"]
    for part, found in summary["checks"].items():
        counts = ", ".join(f"{count} {status}" for status, count in found["counts"].items())
        lines.append(f"{part}: {counts or 'not run'}")
        lines += [f"  {key}: {reason}" for key, reason in found["not_passed"].items()]
    if summary["memory"]:
        lines += ["", "memory, GiB (= : plan and ledger are equal to the byte)"]
        lines += _memory_table(summary["memory"])
    lines += [f"  {key}: {reason}" for key, reason in summary["memory_not_run"].items()]
    if summary["seventy_b"]:
        lines += ["", *summary_70b.lines(summary["seventy_b"])]
    if summary["speed"]:
        lines += ["", "speed", *_speed_table(summary["speed"])]
    if summary["kernels"]:
        lines += ["", *_kernel_table(summary["kernels"])]
    for row in summary["updates"]:
        lines += ["", f"{row['case']}: {row.get('reason', '')}".rstrip(": "), *_update_lines(row)]
    lines += ["", "bytes beside tensors"]
    lines += aligned(
        [
            ("after", "workspaces", "context and other"),
            *(
                (
                    key,
                    number(row["workspace_bytes"], ","),
                    number(row["context_and_other_bytes"], ","),
                )
                for key, row in summary["constants"]["after"].items()
            ),
        ]
    )
    lines += ["", f"{record['verdict']}: {record['verdict_reason']}"]
    lines.append(f"{summary['seconds']:.0f} s")
    return "\n".join(lines)
