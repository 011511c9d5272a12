"""Bad input: one clear line on stderr, exit code 1, no traceback, nothing written or lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memrt.cli import main as command_line
from memrt.cli.output import ReportFolder
from memrt.cli.stacks import parse_stack, parse_stacks, split_stack
from tests.cli.conftest import SHAPES, Command

RUN = [*SHAPES, "--steps", "4"]

USAGE = [
    (["compare", "--strategies", "lissa"], "unknown strategy 'lissa'; did you mean 'lisa'?"),
    (["plan", "--strategies", "lisa(layer=2)"], "no option 'layer'; did you mean 'layers'?"),
    (["plan", "--strategies", "lisa(layers='2')"], "layers='2': must be a whole number"),
    (["plan", "--strategies", "lisa", "lisa"], "'lisa' is listed twice"),
    (["compare", "--strategies", "lisa", "lisa"], "'lisa' is listed twice"),
    (["plan", "--strategies", "none", "lisa"], "'none' stands for no strategy"),
    (["plan", "--strategies", "lisa+"], "a name is missing beside a +"),
    (["plan", "--strategies", "lisa(layers=9)"], "layers=9 is more than the 8 layers"),
    (["compare", "--stpes", "9"], "unknown argument '--stpes'; did you mean '--steps'?"),
    (["plan", "--steps", "9"], "unknown argument '--steps'; see `memrt --help`"),
    (["compare", "--steps", "3"], "--steps: '3' must be a whole number of at least 4"),
    (["plan", "--batch", "two"], "'two' must be a whole number of at least 1"),
    (["plan", "--max-grad-norm", "-1"], "'-1' must be a number at least 0"),
    (["compare", "--lr", "0"], "'0' must be a number above 0"),
    (["compare", "--evaluation-fraction", "1"], "'1' must be a number at least 0 and below 1"),
    (["plan", "--dtype", "float8"], "invalid choice: 'float8'"),
    (["plan", "--gpu", "24parsecs"], "gpu='24parsecs' is neither a known card nor a size"),
    (["plan", "--seq", "5000"], "--seq 5000: embedded Llama has positions for 4096 tokens"),
    (["plan", "--tokenizer", "x"], "--tokenizer has no effect without --data"),
    (["plan", "--truncation", "cut"], "--truncation has no effect without --data"),
    (["plan", "--force"], "--force has no effect without --output"),
    (["plan", "--model", "./nowhere/at-all"], "is not a local path"),
    (["plan", "--gpu", "24"], "--gpu='24': 24 would be bytes; did you mean 24GiB?"),
    (["plan", "--host", "24"], "--host '24': 24 would be bytes; did you mean 24GiB?"),
    (["profile", "--data", "nowhere.txt"], "--data 'nowhere.txt': there is no such file"),
    (["compare", "--evaluation-data", "no.csv"], "--evaluation-data 'no.csv': there is no such"),
    (["profile", "--data", "x.json"], "--data 'x.json': must be a .txt, .jsonl, .csv"),
    (["profile", "--device", "tpu"], "--device tpu: use auto, cpu, cuda or cuda:N"),
    (["profile", "--device", "cuda:99"], "--device cuda:99: torch sees"),
    (["frobnicate"], "invalid choice: 'frobnicate'"),
]


@pytest.mark.parametrize(("words", "expected"), USAGE, ids=lambda value: str(value)[:40])
def test_misuse_is_one_line(memrt: Command, words: list[str], expected: str) -> None:
    result = memrt(*words)
    assert result.code == 1
    assert result.out == ""
    assert expected in result.err
    assert "Traceback" not in result.err
    assert result.error.startswith("memrt") or result.error.startswith("  - ")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("command", ["plan", "profile", "compare"])
def test_data_that_is_not_there_is_told_before_a_model_is_asked_for(
    memrt: Command, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def resolve(*_: object) -> None:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr("memrt.cli.model.Model.resolve", resolve)
    result = memrt(command, "--data", "nowhere.txt", "--model", "somebody/large")
    assert result.code == 1
    assert "--data 'nowhere.txt': there is no such file" in result.error


def test_no_command_shows_the_help(memrt: Command) -> None:
    result = memrt()
    assert result.code == 1
    assert "memrt compare" in result.err
    assert memrt("--version").out.startswith("memrt ")


DATA = [
    ("empty.txt", "", "empty.txt: the file is empty or blank"),
    (
        "holes.jsonl",
        '{"text": "a b c"}\n\n{"text": "d"}\n',
        "holes.jsonl, line 2: the line is empty",
    ),
    ("broken.jsonl", '{"text": "a"}\n{"text": \n', "broken.jsonl, line 2: malformed JSON"),
    ("blank.jsonl", '{"text": "a"}\n{"text": " "}\n', "blank.jsonl, line 2, column 'text'"),
    ("other.jsonl", '{"body": "a"}\n', "name yours with --text-column"),
    (
        "long.jsonl",
        json.dumps({"prompt": "why " * 90, "completion": "so"}) + "\n",
        "give --seq",
    ),
    ("short.txt", "a few words only\n", "do not fill one block of --seq 64"),
]


@pytest.mark.parametrize(("name", "text", "expected"), DATA, ids=[row[0] for row in DATA])
def test_bad_data_is_named_by_file_line_and_flag(
    memrt: Command, model_folder: Callable[..., Path], name: str, text: str, expected: str
) -> None:
    Path(name).write_text(text)
    result = memrt("profile", "--model", model_folder(), *RUN, "--data", name)
    assert result.code == 1
    assert expected in result.error
    assert "sequence_length" not in result.err


def test_models_that_cannot_be_trained_are_refused(
    memrt: Command, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    small = model_folder(vocab_size=100)
    assert "vocab_size=100: must be" in memrt("profile", *RUN, "--model", small).error
    words = ["plan", *SHAPES, "--model"]
    assert "needs loss scaling" in memrt(*words, model_folder(dtype="float16")).error
    image = tmp_path / "vit"
    image.mkdir()
    (image / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "is for image-classification" in memrt("profile", *RUN, "--model", image).error
    (image / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    assert "model_type='no-such-type'" in memrt(*words, image).error
    (image / "config.json").write_text("{")
    assert "not a readable JSON file" in memrt(*words, image).error


def test_weights_without_a_tokenizer_are_refused(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    import torch
    from safetensors.torch import save_file

    folder = model_folder()
    save_file({"x": torch.zeros(1)}, str(folder / "model.safetensors"))
    result = memrt("profile", *RUN, "--model", folder)
    assert "has weights and no tokenizer" in result.error
    assert "--tokenizer" in result.error


def test_a_loss_that_is_not_a_number_stops_the_run(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["--model", model_folder(), *RUN, "--lr", "1e38"]
    result = memrt("profile", *words)
    assert result.code == 1
    assert "Lower the learning rate" in result.error
    result = memrt("compare", *words, "--strategies", "none")
    assert result.code == 1
    assert "none: failed: the loss is" in result.err
    assert not Path("memrt-report").exists()


def test_a_hub_id_without_network_says_so(memrt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = memrt("plan", "--model", "nobody/no-such-model-here")
    assert result.code == 1
    assert "neither a local path nor reachable on the Hub" in result.error


def test_programming_errors_keep_their_traceback(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memrt.cli import plan

    def broken(arguments: Any) -> int:
        raise TypeError("a bug")

    monkeypatch.setattr(plan, "run", broken)
    with pytest.raises(TypeError, match="a bug"):
        memrt("plan")


def test_a_gradient_that_is_not_finite_is_one_line(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memrt.cli import plan
    from memrt.errors import NonFiniteGradientError

    def spoilt(arguments: Any) -> int:
        raise NonFiniteGradientError(step=3, strategy="adalomo", checkpoint="run/checkpoint-2")

    monkeypatch.setattr(plan, "run", spoilt)
    result = memrt("plan")
    assert result.code == 1
    assert "memrt plan: error: a gradient is not finite at optimizer step 3" in result.err
    assert "run/checkpoint-2" in result.error


def test_traceback_shows_where_an_error_was_raised(memrt: Command) -> None:
    with pytest.raises(ValueError, match="is neither a known card nor a size"):
        memrt("plan", "--gpu", "x", "--traceback")


def test_an_interrupt_is_130(memrt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from memrt.cli import plan

    def interrupted(arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "run", interrupted)
    result = memrt("plan")
    assert (result.code, result.error) == (command_line.INTERRUPTED, "memrt plan: interrupted")


# ---------------------------------------------------------------- report folders


def report(folder: Path, kind: str = "compare", **more: str) -> None:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"schema": "memrt.report/1", "kind": kind}))
    for name, text in more.items():
        (folder / name).write_text(text)


def test_an_earlier_report_is_kept_under_the_next_number(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second", "third"):
        folder = ReportFolder.claim(str(target), kind="compare", force=False)
        kept = folder.write(
            {"report.json": '{"schema": "memrt.report/1", "kind": "compare"}', "x": text}
        )
    assert kept == str(tmp_path / "out.2")
    texts = [(tmp_path / name / "x").read_text() for name in ("out.1", "out.2", "out")]
    assert texts == ["first", "second", "third"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.1", "out.2"]


@pytest.mark.parametrize("kind", ["plan", "profile"])
def test_another_commands_report_is_not_touched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    report(target, kind)
    with pytest.raises(ValueError, match="no report of `memrt compare`"):
        ReportFolder.claim(str(target), kind="compare", force=False)


def test_force_replaces_the_report_and_leaves_the_rest(tmp_path: Path) -> None:
    target = tmp_path / "out"
    report(target, "plan", notes="mine")
    folder = ReportFolder.claim(str(target), kind="compare", force=True)
    assert folder.write({"report.json": "new"}) is None
    assert (target / "report.json").read_text() == "new"
    assert (target / "notes").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_file_in_the_place_of_the_folder_is_refused(memrt: Command) -> None:
    Path("memrt-report").write_text("mine")
    result = memrt("compare")
    assert result.code == 1
    assert "this is a file" in result.error
    assert Path("memrt-report").read_text() == "mine"


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_disk_that_is_mounted_to_be_read_is_told_before_the_run(
    memrt: Command, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Who is root may write everywhere, says the system, and then cannot."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    result = memrt(command, "--output", "out")
    assert result.code == 1
    assert "cannot be written to (Read-only file system); name another folder" in result.error
    assert result.err.count("\n") == 1


def test_a_folder_with_other_files_is_refused_before_the_run(memrt: Command) -> None:
    Path("memrt-report").mkdir()
    Path("memrt-report/thesis.tex").write_text("mine")
    result = memrt("compare")
    assert result.code == 1
    assert "--force" in result.error
    assert "reading" not in result.err


def test_a_full_disk_loses_nothing(
    memrt: Command, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memrt.cli import output

    report(Path("memrt-report"), notes="mine")
    before = Path("memrt-report/report.json").read_text()
    written: list[Path] = []

    def full(path: Path, text: str) -> None:
        written.append(path)
        path.write_text(text[:10])
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(output, "_write_durably", full)
    result = memrt("compare", "--model", model_folder(), *RUN, "--strategies", "none")
    assert result.code == 1
    assert "No space left on device" in result.error
    assert "| none " in result.out  # the table was printed before
    assert Path("memrt-report/report.json").read_text() == before
    assert [p.name for p in Path().iterdir()] == ["memrt-report"]


def test_a_closed_pipe_does_not_lose_the_report(model_folder: Callable[..., Path]) -> None:
    folder = model_folder()
    words = ["plan", "--model", str(folder), *SHAPES, "--output", str(folder / "out")]
    command = [sys.executable, "-m", "memrt", *words]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert (folder / "out" / "report.md").is_file()


def test_what_is_short_may_be_read_by_nobody_too() -> None:
    """It lies in Python's buffer until the command has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "memrt", "--version"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_is_all_that_asking_for_it_shows() -> None:
    """transformers' Trainer imports bitsandbytes, which warns of a hub where it has no kernel."""
    done = subprocess.run(
        [sys.executable, "-m", "memrt", "train", "--help"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: memrt train")
    assert done.stderr == ""


# ---------------------------------------------------------------- stacks


def test_a_plus_inside_an_option_does_not_split() -> None:
    assert split_stack("galore(scale=1e+0)+lisa") == ["galore(scale=1e+0)", "lisa"]
    assert split_stack("x(a='p+q', b=[1+2])+y") == ["x(a='p+q', b=[1+2])", "y"]


def test_labels_are_canonical_and_order_is_the_users() -> None:
    stack = parse_stack(["int8_states", "galore( rank = 64 )+lisa"])
    assert stack.label == "int8_states+galore(rank=64)+lisa"
    assert [s.name for s in stack.strategies] == ["lisa", "galore", "int8_states"]
    assert [s.label for s in parse_stacks(["none", "lisa"])] == ["none", "lisa"]
    with pytest.raises(ValueError, match="listed twice"):
        parse_stacks(["lisa+int8_states", "int8_states+lisa"])
