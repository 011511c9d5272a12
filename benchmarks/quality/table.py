"""The table of all quality records for benchmarks/README.md, from their JSON alone.

Every record is of a base model of its own, trained on the machine that continued it, and brings its
own rows of AdamW; the rows of all of them stand in one table for each task, the base beside each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.methods import METHODS

__all__ = ["markdown"]

_MIB = 1 << 20
_ACCOUNTS = ("weights", "gradients", "optimizer", "activations", "workspace")
_LETTERS = "ABCDEFGHIJ"


def _row(base: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    above = row["above_adamw"]
    proxies = ", ".join(f"{rate}: {_loss(loss)}" for rate, loss in row["proxy_losses"].items())
    return (
        row["method"],
        base,
        _loss(row["evaluation_loss"]),
        "" if above is None else f"{above:+.3f}",
        f"{row['learning_rate']:g} ({proxies})",
        f"{row['peak_bytes'] / _MIB:.0f}",
        *(f"{row['account_maxima'].get(account, 0) / _MIB:.0f}" for account in _ACCOUNTS),
    )


def _loss(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _steps(record: Mapping[str, Any]) -> str:
    found = record["conditions"]["configuration"]
    return f"{found['steps']} steps after {found['proxy_steps']} steps with each of three rates"


def _table(records: Sequence[Mapping[str, Any]], task: str) -> str:
    named = list(zip(_LETTERS, records, strict=False))
    bases = "; ".join(
        f"base {letter}, {record['summary']['base_evaluation_loss'][task]:.3f} itself (trained and "
        f"continued on {record['conditions']['cpu']})"
        for letter, record in named
    )
    rows = [
        (row["method"], letter, row)
        for letter, record in named
        for row in record["summary"]["rows"]
        if row["task"] == task
    ]
    order = {method: index for index, method in enumerate(METHODS)}
    rows.sort(key=lambda each: (order.get(each[0], len(order)), each[1]))
    loss = ("held-out loss", "above AdamW", "rate (proxies)")
    header = ("method", "base", *loss, "peak", *_ACCOUNTS)
    cells = [header, ("---",) * len(header), *(_row(letter, row) for _, letter, row in rows)]
    steps = " and ".join(dict.fromkeys(map(_steps, records)))
    lines = [f"**{task}**: {steps}; {bases}.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    missing = [name for name in METHODS if name not in {method for method, _, _ in rows}]
    if missing:
        lines += ["", f"Not in this result: {'; '.join(missing)}."]
    return "\n".join(lines)


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """A table for each task: loss, the rates that were tried, bytes by account (MiB)."""
    tasks = dict.fromkeys(
        task for record in records for task in record["summary"]["base_evaluation_loss"]
    )
    having = {
        task: [each for each in records if task in each["summary"]["base_evaluation_loss"]]
        for task in tasks
    }
    return "\n\n".join(_table(found, task) for task, found in having.items())
