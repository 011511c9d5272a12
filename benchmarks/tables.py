"""Fills the tables of README.md and docs/ from results and from the code, never by hand.

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`; this replaces what
is between them. Run it at the root of a checkout after a result or a strategy has changed:

    python -m benchmarks.tables            # rewrite
    python -m benchmarks.tables --check    # say what is stale; exit code 1 when something is

Whole pages of docs/ that are made from the code (`benchmarks/generated_pages.py`) are written and
checked by the same command.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import generated_pages, strategy_pages, update_semantics
from memrt import registry
from memrt.kernels.quiet import errors_only
from memrt.profiling.render import to_markdown

__all__ = ["TABLES", "fill", "main", "pages"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks") / "results"

_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def compare() -> str:
    """The newest `benchmarks/results/compare-*.json` as `memrt compare` prints it."""
    found = [
        (json.loads(path.read_text("utf-8")), path.relative_to(ROOT).as_posix())
        for path in sorted((ROOT / RESULTS).glob("compare-*.json"))
    ]
    if not found:
        return (
            "No result is committed yet; `memrt compare` prints this table for your machine, in a "
            "few minutes and without a GPU."
        )
    report, path = max(found, key=lambda item: item[0]["conditions"]["date"])
    title, _, page = to_markdown(report).partition("\n")
    assert title.startswith("# "), title
    body = page.split("\n## ")[0].strip()
    return f"{body}\n\n{_conditions(report['conditions'])} Data: [`{path}`]({path})."


def _conditions(conditions: dict[str, Any]) -> str:
    """Hardware, versions and commit in one line; a number without them says nothing."""
    packages = ", ".join(f"{name} {version}" for name, version in conditions["packages"].items())
    threads = f"{conditions['threads']} threads" if conditions["device"] == "cpu" else "one GPU"
    return (
        f"Measured on {conditions['device']} ({conditions['machine']}, {threads}) on "
        f"{conditions['date'][:10]} at commit {conditions['commit']}, Python "
        f"{conditions['python']}, {packages}; text: {conditions['data']}."
    )


def strategies() -> str:
    """Every built-in strategy: what it does, which accounts it lowers, whether it is exact."""
    rows = [("strategy", "what it does", "lowers", "exact"), ("---", "---", "---", "---")]
    for name in registry.names():
        strategy = registry.strategy_class(name)
        if not strategy.__module__.startswith("memrt.strategies."):
            continue  # registered by a third party
        docstring = import_module(strategy.__module__).__doc__ or ""
        summary = docstring.strip().split("\n\n")[0].replace("\n", " ").rstrip(".")
        lowers = ", ".join(account.value for account in strategy.lowers)
        rows.append((f"`{name}`", summary, lowers, "yes" if strategy.exact else "no"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


TABLES: dict[str, Callable[[], str]] = {
    "compare": compare,
    "seventy-b": strategy_pages.frozen_stacks_table,
    "strategies": strategies,
    "update-semantics": update_semantics.markdown,
}


def fill(text: str) -> str:
    """`text` with every table made anew. Raises `ValueError` for a table that nobody makes."""

    def made(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise ValueError(f"table {name!r} is unknown; use one of {', '.join(TABLES)}")
        return f"{match.group(1)}{TABLES[name]()}\n{match.group(3)}"

    return _TABLE.sub(made, text)


def pages() -> Iterator[Path]:
    """The pages that may hold tables."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def _refresh(*, check: bool) -> list[str]:
    """The pages that are stale, made anew unless they are only checked."""
    stale = generated_pages.refresh(ROOT, check=check)
    for page in pages():
        text = page.read_text("utf-8")
        filled = fill(text)
        if filled != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(filled, "utf-8")
    return stale


def main(argv: list[str] | None = None) -> int:
    """Rewrite the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, say what is stale")
    options = parser.parse_args(argv)
    with errors_only("memrt"):  # advice about stacks that are tried for the tables alone
        stale = _refresh(check=options.check)
    if stale and options.check:
        print(f"stale: {', '.join(stale)}; run python -m benchmarks.tables")
        return 1
    for name in stale:
        print(f"rewrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
