"""README and docs: code that runs, commands that exist, links that lead somewhere, fresh tables."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import memrt
from benchmarks import tables
from memrt.cli.main import COMMANDS, _modules, _parser, main
from memrt.cli.stacks import parse_stack
from memrt.cli.train_config import resolve
from memrt.cli.train_words import parse_words
from memrt.errors import ConflictError
from memrt.testing import tiny_model
from tests.packaging.source_tree import ROOT

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/**/*.md"))
    if "memrt-re" not in str(path)
]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_first_program_runs(tmp_path: Path) -> None:
    """As it is printed, with fewer and smaller steps."""
    program = _blocks(README, "python")[0]
    for setting, smaller in (("max_steps=20", "max_steps=2"), ("length=256", "length=32")):
        assert setting in program
        program = program.replace(setting, smaller)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_conflict_is_what_memrt_says() -> None:
    (call,) = re.findall(
        r"^>>> memrt\.prepare\(model, (\[.*?\]), accumulation_steps=4\)$", README, re.M
    )
    with pytest.raises(ConflictError) as refused:
        memrt.prepare(tiny_model("llama"), re.findall(r'"(.*?)"', call), accumulation_steps=4)
    assert f"memrt.errors.ConflictError: {refused.value}\n```" in README


def test_ci_runs_the_commands_of_the_readme() -> None:
    commands = [line for line in "".join(_blocks(README, "bash")).splitlines() if "pip" in line]
    assert commands == [
        "python -m pip install . && memrt compare",
        "python -m pip install -e '.[test]' && python -m pytest",
    ]
    install, test = commands[1].split(" && ")
    ci = (ROOT / ".ci" / "environment.sh").read_text("utf-8")
    assert install.removeprefix("python -m pip install ") in ci
    assert test in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_the_page_are_understood(page: Path) -> None:
    """Every `memrt ...` line of a shell block goes through the parser and the registry."""
    lines = "".join(_blocks(page.read_text("utf-8"), "bash")).splitlines()
    parser = _parser(_modules(None))
    for line in lines:
        command = re.search(r"(?:^|&& )memrt ([a-z].*)$", line)
        if command is not None:
            words = shlex.split(command.group(1), comments=True)
            assert words[0] in COMMANDS, line
            if words[0] == "train":
                given = parse_words(words[1:])
                resolve(given.config, given.settings, base=None)
                continue
            for stack in getattr(parser.parse_args(words), "strategies", None) or []:
                if not stack.startswith("last_layers"):  # the example's, tested with it
                    parse_stack([stack])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
    local = [
        target for target in targets if "://" not in target and not target.startswith("mailto")
    ]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_the_page_names_exist(page: Path) -> None:
    """Paths in backticks, such as `memrt/session.py`."""
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml|sh))`", page.read_text("utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_run_of_the_70b_page_has_a_folder_of_its_own() -> None:
    """In order, each of its commands would find the run of the one before it."""
    page = (ROOT / "docs" / "70b-on-one-gpu.md").read_text("utf-8")
    lines = "".join(_blocks(page, "bash")).splitlines()
    given = [parse_words(shlex.split(line)[2:]) for line in lines if line.startswith("memrt train")]
    folders = [resolve(g.config, g.settings, base=None).values["output"] for g in given]
    assert len(folders) >= 3
    assert len(set(folders)) == len(folders)


def test_the_70b_page_says_which_row_does_not_show_training() -> None:
    page = (ROOT / "docs" / "70b-on-one-gpu.md").read_text("utf-8")
    planned = json.loads((ROOT / "benchmarks" / "results" / "cards.json").read_text("utf-8"))
    rows = [r for r in planned["rows"] if r["model"] == "70B" and r["stack"].startswith("nf4")]
    phases = [row["region"]["phase"] for row in rows]
    assert [phase in ("forward", "backward", "step") for phase in phases] == [True, True, False]
    assert "The third row is no instant of training" in page


def test_the_guide_shows_the_lines_of_the_example() -> None:
    guide = (ROOT / "docs" / "writing-a-strategy.md").read_text("utf-8")
    folder = ROOT / "examples" / "third_party_strategy"
    for language, name in (("python", "last_layers.py"), ("toml", "pyproject.toml")):
        source = (folder / name).read_text("utf-8").splitlines()
        shown = "".join(_blocks(guide, language)).splitlines()
        assert shown
        assert not [line for line in shown if line and line not in source]


def test_no_table_is_stale(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_table_is_found_and_rewritten() -> None:
    fresh = tables.fill(README)
    stale = fresh.replace("| `lisa` |", "| `lizard` |")
    assert stale != fresh
    assert tables.fill(stale) == fresh


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match="table 'nothing' is unknown"):
        tables.fill("<!-- table: nothing -->\n<!-- end -->")


def test_the_newest_comparison_is_shown_with_its_conditions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--steps", "4", "--seq", "16", "--batch", "1", "--evaluation-fraction", "0")
    assert (
        main(["compare", "--strategies", "none", "lisa", *sizes, "--output", str(tmp_path / "out")])
        == 0
    )
    capsys.readouterr()
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name, date in (("a", "2026-03-01T00:00:00Z"), ("b", "2026-02-01T00:00:00Z")):
        report["conditions"]["date"] = date
        (results / f"compare-{name}.json").write_text(json.dumps(report))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    shown = tables.fill("<!-- table: compare -->\nold\n<!-- end -->")
    assert re.search(r"^\| none +\|", shown, re.M)
    assert re.search(r"^\| lisa +\|", shown, re.M)
    assert "2026-03-01" in shown
    assert "(benchmarks/results/compare-a.json)" in shown
    assert f"torch {report['conditions']['packages']['torch']}" in shown
    assert "old" not in shown
