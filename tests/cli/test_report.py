"""`memrt report`: a finished run in other forms, from its report.json; what is none is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from memrt.cli.report import FORMATS
from memrt.profiling.render_html import to_html
from tests.cli.conftest import SHAPES, Command
from tests.profiling.reports import KINDS

PNG = find_spec("matplotlib") is not None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_shown_and_written_again(memrt: Command, kind: str) -> None:
    report = KINDS[kind]()
    Path("run").mkdir()
    Path("run/report.json").write_text(json.dumps(report))
    result = memrt("report", "run")
    assert result.code == 0, result.err
    assert result.out.startswith(f"# memrt {kind}")
    assert Path("run/report.md").read_text(encoding="utf-8", errors="replace").startswith("# memrt")
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert page == to_html(report)
    assert Path("run/report.png").exists() == PNG
    assert json.loads(Path("run/report.json").read_text()) is not None


def test_a_real_run_writes_its_page_and_gives_it_again(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["--model", model_folder(), *SHAPES, "--steps", "4", "--output", "real"]
    assert memrt("profile", *words, "--strategies", "lisa(layers=1)").code == 0
    written = Path("real/report.html").read_text()
    assert "Accounts over the counted steps" in written
    assert memrt("report", "real/report.json", "--format", "html", "--output", "again").code == 0
    assert Path("again/report.html").read_text() == written
    report = json.loads(Path("real/report.json").read_text())
    for sample in report["timeline"]:
        assert sum(sample["accounts"].values()) == sample["bytes"]
    peak = max(report["timeline"], key=lambda sample: sample["bytes"])
    assert peak["accounts"] == report["accounts"]


def test_a_run_of_train_is_found_in_its_folder(memrt: Command) -> None:
    Path("run/memrt").mkdir(parents=True)
    Path("run/memrt/report.json").write_text(json.dumps(KINDS["train"]()))
    result = memrt("report", "run", "--format", "md", "--json")
    assert result.code == 0
    assert result.report["kind"] == "train"
    assert sorted(path.name for path in Path("run/memrt").iterdir()) == ["report.json", "report.md"]


def test_every_format_into_another_folder(memrt: Command) -> None:
    Path("report.json").write_text(json.dumps(KINDS["plan"]()))
    formats = [name for name in FORMATS if name != "png" or PNG]
    assert memrt("report", ".", "--format", *formats, "--output", "a/b").code == 0
    assert sorted(path.name for path in Path("a/b").iterdir()) == sorted(
        f"report.{name}" for name in formats
    )
    assert json.loads(Path("a/b/report.json").read_text()) == KINDS["plan"]()


def test_files_of_something_else_are_kept(memrt: Command) -> None:
    Path("report.json").write_text(json.dumps(KINDS["plan"]()))
    Path("thesis").mkdir()
    Path("thesis/report.md").write_text("mine")
    words = ["report", ".", "--format", "md", "--output", "thesis"]
    result = memrt(*words)
    assert result.code == 1
    assert "it holds report.md of something else" in result.error
    assert Path("thesis/report.md").read_text() == "mine"
    assert memrt(*words, "--force").code == 0


def test_a_full_disk_is_one_line_with_the_folder(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("report.json").write_text(json.dumps(KINDS["plan"]()))
    monkeypatch.setattr(Path, "write_bytes", refuse)
    result = memrt("report", ".", "--format", "md", "--output", "out")
    assert result.code == 1
    assert "the report could not be written to out (No space left on device)" in result.error
    assert list(Path("out").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no such file or folder"),
        ("{", "it is not JSON"),
        ("[1]", "its schema is None"),
        ('{"schema": "other/1"}', "its schema is 'other/1'"),
        ('{"schema": "memrt.report/9", "kind": "plan"}', "newer than this memrt reads"),
        ('{"schema": "memrt.report/1", "kind": "sonnet"}', "kind 'sonnet'"),
        ('{"schema": "memrt.report/1", "kind": "plan"}', "the report is not whole (KeyError"),
        ('{"schema": "memrt.report/1", "kind": "compare", "runs": 3}', "the report is not whole"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(
    memrt: Command, content: str | None, expected: str
) -> None:
    if content is not None:
        Path("report.json").write_text(content)
    result = memrt("report", "report.json")
    assert result.code == 1
    assert expected in result.error
    assert result.err.count("\n") == 1
    assert not Path("report.html").exists()


def test_settings_without_effect_are_refused(memrt: Command, tmp_path: Path) -> None:
    Path("report.json").write_text(json.dumps(KINDS["plan"]()))
    assert "--dark has no effect" in memrt("report", ".", "--format", "md", "--dark").error
    assert "--force has no effect" in memrt("report", ".", "--force").error
    Path("empty").mkdir()
    assert "holds no report.json" in memrt("report", "empty").error
