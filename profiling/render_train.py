"""The sections of a training run: how it went, and what was predicted and counted beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from memrt.profiling.accounts import Account
from memrt.profiling.render import Column, Section
from memrt.profiling.render_outside import watched_sections
from memrt.profiling.render_plan import waterfall_sections
from memrt.profiling.render_profile import driver_section
from memrt.profiling.render_sections import (
    account_title,
    bytes_table,
    conditions_section,
    top_section,
)
from memrt.profiling.report import format_bytes

__all__ = ["peak_line", "train_sections"]

Report = Mapping[str, Any]

_MAX_LOSS_ROWS = 50


def train_sections(report: Report) -> list[Section]:
    """What `memrt train` shows."""
    found = [_result(report)]
    if report["predicted"] is not None or report["peak_bytes"] is not None:
        found.append(_memory(report))
    found.extend(_waterfall(report["predicted"] or {}))
    monitor = report["monitor"]
    if monitor is not None and monitor["at_peak"] and report["peak_bytes"] is not None:
        found.append(driver_section(report))
    found.extend(watched_sections(report))
    found.append(_losses(report))
    if report["data"] is not None:
        found.append(_data(report["data"]))
    if report["peak_bytes"] is not None:
        found.append(top_section(report))
    found.append(conditions_section(report["conditions"]))
    return found


def _result(report: Report) -> Section:
    losses = report["losses"]
    lines = [f"- steps: {report['steps']}"]
    if report["resumed_from"] is not None:
        lines[0] += f", resumed from {report['resumed_from']}"
    if losses:
        first, last = losses[0], losses[-1]
        lines.append(
            f"- training loss: {_loss(first)} at step {first['step']}, {_loss(last)} at step "
            f"{last['step']}"
        )
    if report["evaluation_losses"]:
        earlier = report["evaluation_losses"][:-1][:1]
        before = "".join(f"{_loss(each)} at step {each['step']}, " for each in earlier)
        lines.append(
            f"- evaluation loss: {before}{_loss(report['evaluation_losses'][-1])} at the end"
        )
    accuracies = report.get("evaluation_accuracies")
    if accuracies:
        before = "".join(
            f"{each['accuracy']:.3f} at step {each['step']}, " for each in accuracies[:-1][:1]
        )
        lines.append(f"- evaluation accuracy: {before}{accuracies[-1]['accuracy']:.3f} at the end")
    if report["tokens_per_second"] is not None:
        lines.append(
            f"- tokens/s: {report['tokens_per_second']:,.0f} (padding, evaluation, saving and the "
            "steps under the ledger left out)"
        )
    lines.append(f"- model: {report['output']}")
    conditions = report["conditions"]
    stack = "+".join(conditions["strategies"]) or "none"
    return Section(title=f"memrt train: {conditions['model']}, {stack}", before=["\n".join(lines)])


def _loss(log: Report) -> str:
    return "not finite" if log["loss"] is None else f"{log['loss']:.3f}"


def _memory(report: Report) -> Section:
    predicted, accounts = report["predicted"], report["accounts"]
    columns = [Column(title="at the peak")]
    rows: list[list[Any]] = [[account_title(account.value)] for account in Account]
    rows.append(["peak"])
    if predicted is not None:
        columns.append(Column(title="predicted", kind="bytes"))
        _append(rows, [predicted["accounts"][a.value] for a in Account], predicted["peak_bytes"])
    if accounts is not None:
        columns.append(Column(title="counted", kind="bytes"))
        _append(rows, [accounts[a.value] for a in Account], report["peak_bytes"])
    monitor = report["monitor"] or {}
    missing = []
    for title, value, reason in (
        ("allocator", (monitor.get("allocator") or {}).get("peak_allocated_bytes"), "allocator"),
        ("NVML", monitor.get("process_peak_bytes"), "nvml"),
        ("RSS", monitor.get("rss_peak_bytes"), ""),
    ):
        if value is not None:
            columns.append(Column(title=title, kind="bytes"))
            _append(rows, [None] * len(Account), value)
        elif monitor:
            missing.append(f"{title}: not available: {monitor['unavailable'].get(reason)}.")
    table = bytes_table(columns, rows)
    return Section(
        title=f"Memory ({table.unit})",
        before=[_sources(report)],
        table=table,
        after=[*missing, *_gaps(report)],
    )


def _waterfall(predicted: Report) -> list[Section]:
    """What every strategy saves, or why that was not planned; of earlier versions neither."""
    left_out = predicted.get("waterfall_left_out")
    if left_out:
        return [Section(title="What every strategy saves", before=[f"Not planned: {left_out}."])]
    told = "Predicted: memrt plan of every stack before the run, at its largest batch."
    return [replace(section, before=[told]) for section in waterfall_sections(predicted)]


def _append(rows: list[list[Any]], accounts: list[Any], peak: Any) -> None:
    for row, value in zip(rows, [*accounts, peak], strict=True):
        row.append(value)


def _sources(report: Report) -> str:
    parts = []
    if report["predicted"] is not None:
        batch, tokens = report["predicted"]["shape"]
        parts.append(
            f"Predicted: memrt plan before the run, at its largest batch ({batch} × {tokens} "
            "tokens)."
        )
    if report["peak_bytes"] is not None:
        region = report["region"]
        where = f" in {region['module']}" if region["module"] else ""
        steps = report["num_counted_steps"]
        counted = f"over the first {steps} optimizer steps"
        if not steps:
            counted = "in the first optimizer step, in which the run ended"
        parts.append(f"Counted: the ledger {counted}; the peak comes in {region['phase']}{where}.")
    if report["monitor"] is not None:
        parts.append("RSS is all of this process: Python, libraries, data, and the run.")
    return " ".join(parts)


def _gaps(report: Report) -> list[str]:
    left_out = (report["predicted"] or {}).get("not_planned")
    return [f"Not in the prediction: {', '.join(left_out)}."] if left_out else []


def _losses(report: Report) -> Section:
    evaluation = {each["step"]: each["loss"] for each in report["evaluation_losses"]}
    training = {each["step"]: each["loss"] for each in report["losses"]}
    steps = sorted({*training, *evaluation})
    every = -(-len(steps) // _MAX_LOSS_ROWS) or 1
    kept = [
        step
        for index, step in enumerate(steps)
        if index % every == 0 or step in evaluation or step == steps[-1]
    ]
    columns = [
        Column(title="step", kind="count"),
        Column(title="training loss", kind="loss"),
        Column(title="evaluation loss", kind="loss"),
    ]
    rows = [[step, training.get(step), evaluation.get(step)] for step in kept]
    accuracies = report.get("evaluation_accuracies")
    if accuracies:
        at = {each["step"]: each["accuracy"] for each in accuracies}
        columns.append(Column(title="evaluation accuracy", kind="loss"))
        for row in rows:
            row.append(at.get(row[0]))
    table = bytes_table(columns, rows)
    return Section(
        title="Losses",
        before=["Training loss: the mean since the log before."],
        table=table,
        file_only=True,
    )


def _data(data: Report) -> Section:
    lines = [f"- longest example allowed: {data['sequence_length']} tokens"]
    for name in ("train", "evaluation"):
        part = data[name]
        if part is None:
            continue
        lost = {
            "truncated": part["num_truncated_examples"],
            "dropped for their length": part["num_dropped_examples"],
            "without a trained token": part["num_untrainable_examples"],
        }
        told = "".join(f", {count:,} {what}" for what, count in lost.items() if count)
        if part["kind"] == "classification":
            lines.append(
                f"- {name}: {part['num_examples']:,} examples of {part['kind']} from "
                f"{part['source']}, {part['num_tokens']:,} tokens, longest "
                f"{part['longest_example']}{told}"
            )
            continue
        packed = "packed" if part["packed"] else f"longest {part['longest_example']}"
        lines.append(
            f"- {name}: {part['num_examples']:,} examples of {part['kind']} from {part['source']}, "
            f"{part['num_tokens']:,} tokens, {part['num_masked_tokens']:,} masked, {packed}{told}"
        )
    if data.get("label_names"):
        lines.append(f"- labels: {', '.join(data['label_names'])}")
    return Section(title="Data", before=["\n".join(lines)], file_only=True)


def peak_line(predicted: Report) -> str:
    """A prediction on one line, for before the run."""
    accounts = ", ".join(
        f"{account_title(a.value)} {format_bytes(predicted['accounts'][a.value])}" for a in Account
    )
    return f"predicted peak {format_bytes(predicted['peak_bytes'])}: {accounts}"
