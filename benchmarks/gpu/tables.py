"""Columns for a terminal, and what stands in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["GIB", "aligned", "gib", "number", "own_bytes"]

GIB = 2**30


def own_bytes(driver: Mapping[str, Any]) -> int | None:
    """What the process had on the device; the device's growth is without what it had before."""
    own: int | None = driver["process_peak_bytes"]
    if own is not None and driver.get("process_source") == "device delta":
        own += driver.get("context_bytes") or 0
    return own


def gib(num_bytes: int | None) -> str:
    """Bytes in GiB; a dash for what nobody knows."""
    return "-" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def number(value: float | None, form: str) -> str:
    """A number in its form; a dash for what nobody knows."""
    return "-" if value is None else format(value, form)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join((first, *others)).rstrip()
