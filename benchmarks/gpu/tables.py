"""Columns for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["GIB", "aligned", "gib", "number"]

GIB = 2**30


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
