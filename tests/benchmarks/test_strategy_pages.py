"""Pages from docstrings: nothing lost, nothing broken by Markdown, bytes from the plans' file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cards, generated_pages, strategy_pages
from benchmarks.cards import MODELS, REFERENCE, STACKS
from memrt.cli.stacks import parse_stack
from memrt.compatibility import Compatibility, buildable, facts_of_kinds, survey
from memrt.profiling.accounts import Account
from memrt.registry import strategy_class

NAMES = generated_pages.built_in()
GIB = 2**30


@pytest.fixture(scope="module")
def matrix() -> Compatibility:
    strategies, unbuilt = buildable(["badam", "fused_loss", "galore", "lisa"])
    return survey(strategies, facts_of_kinds(), unbuilt=unbuilt)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_explained(name: str) -> None:
    cls = strategy_class(name)
    described = strategy_pages.options(cls)
    prose = " ".join((each.__doc__ or "") for each in cls.__mro__)
    unsaid = [
        each.name
        for each in fields(cls)
        if each.name not in described and f"`{each.name}`" not in prose
    ]
    assert not unsaid, f"say what {', '.join(unsaid)} is in the docstring of {cls.__name__}"


@pytest.mark.parametrize("name", NAMES)
def test_every_docstring_names_its_source(name: str) -> None:
    text = "\n\n".join(strategy_pages._paragraphs(strategy_class(name)))
    assert "arXiv" in text or "memrt's" in text or "`memrt." in text or "exact" in text.lower()


def test_a_page_says_what_the_docstring_says(matrix: Compatibility) -> None:
    page = strategy_pages.strategy_page("galore", matrix)
    assert page.startswith("# galore\n\n**GaLore without the gradient: AdamW in a rank-r subspace")
    assert "arXiv 2403.03507" in page
    assert "| `rank` | `128` | of the subspace." in page
    assert "| lowers | gradients, optimizer |" in page
    assert "| breaks | a weight's full gradient exists |" in page
    assert "| `fsdp` | all | fsdp needs that a weight's full gradient exists" in page
    partners = ", ".join(f"[`{name}`]({name}.md)" for name in ("badam", "fused_loss", "lisa"))
    assert f"Together with: {partners}." in page
    refused = strategy_pages.strategy_page("lisa", matrix)
    assert "| [`badam`](badam.md) | all | badam and lisa both own the active set" in refused


def test_stars_and_brackets_mean_themselves() -> None:
    shown = strategy_pages._prose("8 * m * n, rank<m, a_b and `x * <y>`")
    assert shown == r"8 \* m \* n, rank&lt;m, a\_b and `x * <y>`"
    block = strategy_pages._paragraph("Then\n    y = x * W\nfollows.")
    assert block == "Then\n\n```text\ny = x * W\n```\n\nfollows."


def _row(size: str, stack: str, peak: int) -> dict[str, Any]:
    return {
        "model": size,
        "stack": stack,
        "reason": None,
        "peak_bytes": peak,
        "accounts": {account.value: peak // 5 for account in Account},
        "place_peaks": {"device": peak, "host": 2 * GIB, "disk": 0},
        "region": {"step": 1, "phase": "backward", "module": ""},
        "device_bytes": {"low": peak, "expected": peak, "high": peak},
    }


def test_the_first_stack_that_fits_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: Compatibility
) -> None:
    file = tmp_path / "cards.json"
    monkeypatch.setattr(strategy_pages, "FILE", file)
    assert "Not planned yet" in strategy_pages.cards_page()
    assert "Not planned yet" in strategy_pages.strategy_page("lisa", matrix)
    sizes = {stack: (10 - index) * 4 * GIB for index, (stack, _) in enumerate(STACKS)}
    rows = [_row(size, stack, peak) for size in MODELS for stack, peak in sizes.items()]
    rows.append(_row(REFERENCE, "lisa", 15 * GIB))
    conditions = {
        "date": "2026-01-02T",
        "commit": "abc",
        "packages": {"torch": "2", "transformers": "5"},
    }
    file.write_text(json.dumps({"rows": rows, "conditions": conditions}))
    page = strategy_pages.cards_page()
    cells = dict.fromkeys(MODELS, "1 (40.00 GiB)")
    assert f"| 80 GiB (A100, H100) | {' | '.join(cells.values())} |" in page
    assert "| 24 GiB (RTX 4090, A10, L4) | 6 (20.00 GiB) |" in page
    assert "| 8 GiB | 9 (8.00 GiB) |" in page
    assert "| 9 | 8.0 + 2.0 on the host |" in page
    shown = strategy_pages.strategy_page("lisa", matrix)
    assert "| **peak** | 40.0 | 15.0 |" in shown


def test_the_stacks_are_stacks() -> None:
    for stack, what in STACKS:
        parse_stack([stack])
        assert what
    assert cards.STACKS[0][0] == "none"


@pytest.mark.slow
def test_a_committed_row_is_what_is_planned_now() -> None:
    if not cards.FILE.is_file():
        pytest.skip("benchmarks/results/cards.json is not there; run python -m benchmarks.cards")
    rows = json.loads(cards.FILE.read_text("utf-8"))["rows"]
    committed = {(row["model"], row["stack"]): row for row in rows}
    for stack in ("none", "activation_checkpoint+fused_loss+int8_states"):
        assert cards.planned("8B", stack) == committed[("8B", stack)], (
            "run python -m benchmarks.cards, then python -m benchmarks.tables"
        )


def test_a_page_of_a_strategy_that_is_gone_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_pages, "pages", lambda: {"docs/strategies/lisa.md": "new"})
    (tmp_path / "docs/strategies").mkdir(parents=True)
    (tmp_path / "docs/strategies/lisa.md").write_text("old")
    (tmp_path / "docs/strategies/gone.md").write_text("old")
    stale = ["docs/strategies/gone.md", "docs/strategies/lisa.md"]
    assert generated_pages.refresh(tmp_path, check=True) == stale
    assert generated_pages.refresh(tmp_path, check=False) == stale
    assert (tmp_path / "docs/strategies/lisa.md").read_text() == "new"
    assert not (tmp_path / "docs/strategies/gone.md").exists()
    assert generated_pages.refresh(tmp_path, check=True) == []
