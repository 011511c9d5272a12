"""Pages of docs/ that are made from the code alone; `python -m benchmarks.tables` writes them.

A page that nobody makes any more is removed from the folders that hold nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.family_page import family_page
from benchmarks.spellings_page import spellings_page
from benchmarks.strategy_pages import cards_page, index_page, strategy_page
from memrt import registry
from memrt.compatibility import Compatibility, buildable, facts_of_kinds, survey
from memrt.compatibility_sections import matrix_sections
from memrt.profiling.render import sections_to_markdown

__all__ = ["MARK", "built_in", "compatibility_page", "pages", "refresh"]

MARK = "<!-- Made by `python -m benchmarks.tables` from the code; edits here are lost. -->\n\n"

_FOLDERS = ("docs/strategies",)
"""Folders that hold generated pages only."""


def built_in() -> list[str]:
    """Names of the strategies that memrt ships; third parties' are not ours to document."""
    return [
        name
        for name in registry.names()
        if registry.strategy_class(name).__module__.startswith("memrt.strategies.")
    ]


def pages() -> dict[str, str]:
    """Path in the checkout -> text."""
    names, found = built_in(), _matrix()
    return {
        "docs/coming-from-elsewhere.md": MARK + spellings_page(),
        "docs/compatibility.md": _compatibility(found),
        "docs/families.md": MARK + family_page(list(found.strategies)),
        "docs/which-strategy.md": MARK + cards_page(),
        "docs/strategies/README.md": MARK + index_page(names),
        **{f"docs/strategies/{name}.md": MARK + strategy_page(name, found) for name in names},
    }


def compatibility_page() -> str:
    """What `memrt compat` prints, as a page."""
    return _compatibility(_matrix())


def _compatibility(found: Compatibility) -> str:
    return MARK + sections_to_markdown(matrix_sections(found))


def _matrix() -> Compatibility:
    strategies, unbuilt = buildable(built_in())
    return survey(strategies, facts_of_kinds(), unbuilt=unbuilt)


def refresh(root: Path, *, check: bool) -> list[str]:
    """Write what differs, unless `check`; returns the paths that were stale."""
    wanted = pages()
    stale = [path for path, text in wanted.items() if _read(root / path) != text]
    orphans = [path for path in _present(root) if path not in wanted]
    if not check:
        for path in stale:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(wanted[path], "utf-8")
        for path in orphans:
            (root / path).unlink()
    return sorted([*stale, *orphans])


def _read(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None


def _present(root: Path) -> Iterator[str]:
    for folder in _FOLDERS:
        for path in sorted((root / folder).glob("*.md")):
            yield path.relative_to(root).as_posix()
