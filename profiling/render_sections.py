"""What each kind of report shows: sections from the JSON of plan, profile and compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memrt.profiling.accounts import Account
from memrt.profiling.render import Column, Section, Table, unit_of
from memrt.profiling.report import format_bytes

__all__ = [
    "account_title",
    "bytes_table",
    "conditions_section",
    "device_section",
    "phases_section",
    "places_section",
    "sections",
    "top_section",
]

Report = Mapping[str, Any]

_SHORT = {
    Account.WEIGHTS.value: "weights",
    Account.GRADIENTS.value: "grad.",
    Account.OPTIMIZER.value: "optim.",
    Account.ACTIVATIONS.value: "activ.",
    Account.WORKSPACE.value: "worksp.",
}
_ACCOUNTS = [account.value for account in Account]


def sections(report: Report) -> list[Section]:
    """The sections of a report; the first one is the page's title."""
    kinds: dict[str, Callable[[Report], list[Section]]] = {
        "compare": _compare,
        "plan": _plan,
        "profile": _profile,
        "train": _train,
    }
    kind = report.get("kind")
    if kind not in kinds:
        raise ValueError(f"report of kind {kind!r}: must be one of {', '.join(kinds)}")
    return kinds[kind](report)


def account_title(name: str) -> str:
    """An account as people call it."""
    return "optimizer state" if name == Account.OPTIMIZER.value else name


def bytes_table(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> Table:
    """A table with the unit that suits it."""
    return Table(columns=columns, rows=rows, unit=unit_of(rows))


def account_columns() -> list[Column]:
    """A column for each account."""
    return [
        Column(title=account_title(name), short=_SHORT[name], kind="bytes") for name in _ACCOUNTS
    ]


# ---------------------------------------------------------------- compare


def _compare(report: Report) -> list[Section]:
    done = [run for run in report["runs"] if run["status"] == "ok"]
    failed = [run for run in report["runs"] if run["status"] != "ok"]
    found = [_comparison(report, done)]
    if failed:
        lines = [f"- {run['stack']}: {run['status']}: {run['reason']}" for run in failed]
        found.append(Section(title="Not run", before=["\n".join(lines)]))
    found.append(_at_the_peak(done))
    found.append(conditions_section(report["conditions"]))
    return found


def _comparison(report: Report, runs: Sequence[Report]) -> Section:
    first = runs[0]["peak_bytes"] if runs else 0
    gpu = report.get("gpu")
    columns = [
        Column(title="stack"),
        *account_columns(),
        Column(title="peak", kind="bytes"),
        Column(title="Δ peak", kind="count", optional=True),
        Column(title="tokens/s", short="tok/s", kind="count"),
        Column(title="final loss", short="loss", kind="loss"),
        Column(title="held-out loss", short="held-out", kind="loss", optional=True),
    ]
    rows = []
    for run in runs:
        change = f"{(run['peak_bytes'] / first - 1) * 100:+.0f} %" if run is not runs[0] else None
        spoilt = "evaluation_loss" in run.get("not_finite", ())  # by the last update
        rows.append(
            [
                run["stack"],
                *(run["account_maxima"][name] for name in _ACCOUNTS),
                run["peak_bytes"],
                change,
                run["tokens_per_second"],
                run["loss"],
                "not finite" if spoilt else run["evaluation_loss"],
            ]
        )
    if gpu is not None:
        columns.append(Column(title=f"fits {gpu['text']}"))
        for row, run in zip(rows, runs, strict=True):
            row.append("yes" if run["fits"] else "no")
    table = bytes_table(columns, rows)
    return Section(
        title="memrt compare",
        before=[_headline(report["conditions"])],
        table=table,
        after=[_how_to_read(table.unit, report["conditions"])],
    )


def _headline(conditions: Report) -> str:
    accumulation = conditions["accumulation_steps"]
    windows = f" × {accumulation} micro-batches" if accumulation > 1 else ""
    return (
        f"{conditions['model']}, {conditions['num_parameters'] / 1e6:.1f} M parameters, "
        f"{conditions['dtype']}, {conditions['batch_size']} × {conditions['sequence_length']} "
        f"tokens{windows}, {conditions['steps']} optimizer steps on {conditions['device']}."
    )


def _how_to_read(unit: str | None, conditions: Report) -> str:
    return (
        f"Bytes in {unit}, as the ledger counted them over the first "
        f"{conditions['ledger_steps']} optimizer steps: for each account its largest, whenever it "
        "came; peak is the largest sum at one instant, so the accounts of a row add up to more. "
        "Every stack starts from the same weights and sees the same batches. Tokens/s without the "
        f"ledger, after {conditions['warm_up_steps']} step of warm-up. Final loss: mean over the "
        f"last {conditions['loss_steps']} steps, on the training batches."
    )


def _at_the_peak(runs: Sequence[Report]) -> Section:
    columns = [
        Column(title="stack"),
        *account_columns(),
        Column(title="peak", kind="bytes"),
        Column(title="on the host", kind="bytes"),
        Column(title="phase of the peak"),
    ]
    rows = [
        [
            run["stack"],
            *(run["accounts"][name] for name in _ACCOUNTS),
            run["peak_bytes"],
            run["place_peaks"]["host"],
            run["region"]["phase"],
        ]
        for run in runs
    ]
    table = bytes_table(columns, rows)
    return Section(
        title="At the instant of the peak",
        before=[f"Bytes in {table.unit}; the accounts of a row add up to its peak."],
        table=table,
        file_only=True,
    )


def phases_section(report: Report) -> Section:
    """Peak of every phase."""
    rows = [[phase, peak] for phase, peak in report["phases"].items()]
    table = bytes_table([Column(title="phase"), Column(title="peak", kind="bytes")], rows)
    return Section(title=f"Phases ({table.unit})", table=table)


def places_section(report: Report) -> Section:
    """Where the bytes lie."""
    rows = [
        [place, at_peak, report["place_peaks"][place]]
        for place, at_peak in report["places"].items()
    ]
    columns = [
        Column(title="place"),
        Column(title="at the peak", kind="bytes"),
        Column(title="largest", kind="bytes"),
    ]
    table = bytes_table(columns, rows)
    return Section(title=f"Places ({table.unit})", table=table)


def device_section(report: Report) -> Section:
    """What the card must hold: the peak and what the allocator cannot see."""
    bounds = ("low", "expected", "high")
    peak = report["rounded_peak_bytes"]
    rows: list[list[Any]] = [["peak, each tensor rounded up to 512 B", *[peak] * 3, "counted"]]
    for each in report["overheads"]:
        rows.append([each["name"], *(each[bound] for bound in bounds), each["source"]])
    rows.append(["on the device", *(report["device_bytes"][bound] for bound in bounds), ""])
    columns = [
        Column(title="on a GPU"),
        *(Column(title=bound, kind="bytes") for bound in bounds),
        Column(title="source"),
    ]
    table = bytes_table(columns, rows)
    after = []
    if report["gpu"] is not None:
        needed = report["device_bytes"]["high"]
        verdict = "fits" if needed <= report["gpu"]["total_bytes"] else "does not fit"
        high = format_bytes(needed)
        after.append(f"It {verdict} {report['gpu']['text']}: the high bound is {high}.")
    return Section(title=f"On a GPU ({table.unit})", table=table, after=after)


def top_section(report: Report) -> Section:
    """The largest storages alive at the peak."""
    rows = [
        [each["bytes"], each["account"], each["module"] or each["owner"], each["operator"]]
        for each in report["top_allocations"]
    ]
    columns = [
        Column(title="bytes", kind="bytes"),
        Column(title="account"),
        Column(title="module"),
        Column(title="operator"),
    ]
    table = bytes_table(columns, rows)
    return Section(title=f"Largest at the peak ({table.unit})", table=table, file_only=True)


def conditions_section(conditions: Report) -> Section:
    """Hardware, versions, commit, configuration."""
    lines = []
    for name, value in conditions.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        lines.append(f"- {name.replace('_', ' ')}: {value}")
    return Section(title="Conditions", before=["\n".join(lines)], file_only=True)


def _plan(report: Report) -> list[Section]:
    from memrt.profiling.render_plan import plan_sections

    return plan_sections(report)


def _profile(report: Report) -> list[Section]:
    from memrt.profiling.render_plan import waterfall_sections
    from memrt.profiling.render_profile import profile_sections

    first, *rest = profile_sections(report)
    return [first, *waterfall_sections(report), *rest]


def _train(report: Report) -> list[Section]:
    from memrt.profiling.render_train import train_sections

    return train_sections(report)
