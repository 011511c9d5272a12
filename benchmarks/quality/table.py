"""The table of a quality record for benchmarks/README.md, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.methods import METHODS

__all__ = ["markdown"]

_MIB = 1 << 20
_ACCOUNTS = ("weights", "gradients", "optimizer", "activations", "workspace")


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    above = row["above_adamw"]
    proxies = ", ".join(f"{rate}: {_loss(loss)}" for rate, loss in row["proxy_losses"].items())
    return (
        row["method"],
        _loss(row["evaluation_loss"]),
        "" if above is None else f"{above:+.3f}",
        f"{row['learning_rate']:g} ({proxies})",
        f"{row['peak_bytes'] / _MIB:.0f}",
        *(f"{row['account_maxima'].get(account, 0) / _MIB:.0f}" for account in _ACCOUNTS),
    )


def _loss(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _table(record: Mapping[str, Any], task: str) -> list[str]:
    summary, configuration = record["summary"], record["conditions"]["configuration"]
    rows = [row for row in summary["rows"] if row["task"] == task]
    header = ("method", "held-out loss", "above AdamW", "rate (proxies)", "peak", *_ACCOUNTS)
    cells = [header, ("---",) * len(header), *map(_row, rows)]
    lines = [
        f"**{task}**: {configuration['steps']} steps after {configuration['proxy_steps']} steps "
        f"with each of three rates; the base's own loss is "
        f"{summary['base_evaluation_loss'][task]:.3f} (trained and continued on "
        f"{record['conditions']['cpu']}).",
        "",
        *("| " + " | ".join(row) + " |" for row in cells),
    ]
    missing = [name for name in METHODS if name not in {row["method"] for row in rows}]
    if len(missing) > len(rows):
        lines += [
            "",
            f"{len(rows)} of {len(METHODS)} methods, compared with AdamW from their base.",
        ]
    elif missing:
        lines += ["", f"Not in this result: {'; '.join(missing)}."]
    return lines


def markdown(record: Mapping[str, Any]) -> str:
    """A table for each task: loss, the rates that were tried, bytes by account (MiB)."""
    tasks = list(record["summary"]["base_evaluation_loss"])
    return "\n\n".join("\n".join(_table(record, task)) for task in tasks)
