"""The table of an SST-2 record for benchmarks/README.md, from its JSON alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.sst2_stacks import STACKS

__all__ = ["markdown"]

_MIB = 1 << 20
_ACCOUNTS = ("weights", "gradients", "optimizer", "activations", "workspace")
_VERDICTS = {True: "met", False: "**missed**", None: "not judged"}


def _row(row: Mapping[str, Any], usual: str) -> tuple[str, ...]:
    below = row["below_adamw"]
    accounts = (row["accounts"].get(account, 0) for account in _ACCOUNTS)
    return (
        row["stack"],
        f"{100 * row['accuracy']:.1f} ({', '.join(f'{100 * a:.1f}' for a in row['accuracies'])})",
        "" if below is None else f"{100 * (0.0 - below):+.1f}",
        f"{100 * row['above_probe']:+.1f}",
        _VERDICTS[row["met"]],
        f"{row['learning_rate']:g}",
        f"{row['peak_bytes'] / _MIB:.0f}",
        *(f"{each / _MIB:.0f}" for each in accounts),
        f"{row['processor_seconds']:.0f}" + ("" if row["cpus"] == [usual] else " *"),
    )


def _made_on(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The processor of most rows, and a sentence about processors and commits."""
    usual = Counter(cpu for row in rows for cpu in row["cpus"]).most_common(1)[0][0]
    commits = sorted({commit for row in rows for commit in row["commits"]})
    others = sorted({cpu for row in rows for cpu in row["cpus"]} - {usual})
    text = f"processor seconds of a run's training on {usual}"
    if others:
        text += f" (* on {', '.join(others)})"
    return usual, f"{text}; runs of commit {', '.join(commits)}."


def _probe(probe: Mapping[str, float]) -> str:
    text = f"{100 * probe['accuracy']:.1f}"
    if "tuned_accuracy" in probe:
        text += f", with a penalty chosen on held-out rows {100 * probe['tuned_accuracy']:.1f}"
    return text


def markdown(record: Mapping[str, Any]) -> str:
    """A caption, a row for each stack, and what is refused with its reason."""
    summary, configuration = record["summary"], record["conditions"]["configuration"]
    usual, made_on = _made_on(summary["rows"])
    rows = [
        (
            *("stack", "accuracy (seeds)", "AdamW", "probe", "goal", "rate", "peak"),
            *_ACCOUNTS,
            "seconds",
        ),
        ("---",) * 13,
        *(_row(row, usual) for row in summary["rows"]),
    ]
    caption = (
        f"SST-2's dev set, {configuration['model']}, {configuration['steps']} steps of "
        f"{configuration['batch_size']} rows of at most {configuration['max_tokens']} tokens, "
        f"{configuration['rows']} rows; "
        f"accuracy in %, the mean of {configuration['seeds']} seeds (goals are judged by 3), and "
        f"points above full "
        f"AdamW and above a linear probe on the frozen encoder "
        f"({_probe(summary['probe'])}); bytes at the peak of a step on the longest "
        f"rows, MiB; {made_on}"
    )
    lines = [
        caption,
        "",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]
    missing = [name for name in STACKS if name not in {row["stack"] for row in summary["rows"]}]
    if missing:
        lines += ["", f"Not in this result: {'; '.join(missing)}."]
    if summary["refused"]:
        lines += ["", "Refused alone on this model:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in sorted(summary["refused"].items())]
    return "\n".join(lines)
