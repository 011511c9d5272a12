"""Puts the committed results into benchmarks/README.md, from their JSON alone.

    python -m benchmarks.render            # rewrite
    python -m benchmarks.render --check    # exit code 1 when the page is stale

`python -m benchmarks.tables` does the same for README.md and docs/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.optimizer_step import whole_steps
from benchmarks.quality import speeds, sst2_table, why
from benchmarks.quality import table as quality_table
from benchmarks.record import RESULTS, ROOT, SCHEMA, check_record

__all__ = ["fill", "main", "records", "results_table"]

PAGE = ROOT / "benchmarks" / "README.md"
NONE = "No result is committed yet."

_TABLE = re.compile(
    r"(<!-- table: (results|sst2|quality|quality-why|quality-speeds|whole-steps) -->\n).*?"
    r"(<!-- end -->)",
    re.DOTALL,
)


def records(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """File name and record of every result of this schema, by name; others' files are left."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        if record.get("schema") == SCHEMA:
            check_record(record)
            found.append((path.name, record))
    return found


def _where(found: Mapping[str, Any]) -> str:
    if found["device"] != "cpu":
        return str(found["device"])
    return f"{found['cpu']}, {found['cores']} cores"


def _when(found: Mapping[str, Any]) -> str:
    changed = {True: " with uncommitted changes", False: "", None: ""}[found["dirty"]]
    torch = found["packages"].get("torch", "unknown")
    return f"{found['date'][:10]}, {found['commit']}{changed}, torch {torch}"


def results_table(folder: Path) -> str:
    """A row for each result: what was claimed, what came out, where and when."""
    found = records(folder)
    if not found:
        return NONE
    rows = [
        ("benchmark", "goal", "verdict", "measured", "machine", "when"),
        ("---",) * 6,
    ]
    for name, record in found:
        where = record["conditions"]
        rows.append(
            (
                f"[`{record['name']}`](results/{name})",
                record["goal"],
                f"**{record['verdict']}**",
                record["verdict_reason"],
                _where(where),
                _when(where),
            )
        )
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    )


def _tables(name: str, markdown: Callable[[Mapping[str, Any]], str]) -> Callable[[Path], str]:
    """Makes the tables of all results of that name, one after another."""
    return _table(name, lambda found: "\n\n".join(map(markdown, found)))


def _table(
    name: str, markdown: Callable[[Sequence[Mapping[str, Any]]], str]
) -> Callable[[Path], str]:
    """Makes one table of all results of that name."""

    def make(folder: Path) -> str:
        found = [record for _, record in records(folder) if record["name"] == name]
        return markdown(found) if found else NONE

    return make


_MADE = {
    "results": results_table,
    "sst2": _tables("sst2", sst2_table.markdown),
    "quality": _table("quality", quality_table.markdown),
    "quality-why": _tables("quality_why", why.markdown),
    "quality-speeds": _tables("quality_speeds", speeds.markdown),
    "whole-steps": _tables("optimizer_step", whole_steps.markdown),
}


def fill(text: str, folder: Path) -> str:
    """`text` with its tables made anew."""
    if not _TABLE.search(text):
        raise ValueError("the page has no `<!-- table: results -->` to fill")
    return _TABLE.sub(lambda match: f"{match[1]}{_MADE[match[2]](folder)}\n{match[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render")
    parser.add_argument("--check", action="store_true", help="change nothing, say what is stale")
    arguments = parser.parse_args(argv)
    text = PAGE.read_text("utf-8")
    filled = fill(text, RESULTS)
    if filled == text:
        return 0
    if arguments.check:
        print("stale table in benchmarks/README.md; run python -m benchmarks.render")
        return 1
    PAGE.write_text(filled, "utf-8")
    print("rewrote benchmarks/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
