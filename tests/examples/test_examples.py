"""Every example runs as its first lines say, in an empty folder and with tiny settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def _run(*command: str, cwd: Path, path: Path = ROOT) -> str:
    """Run Python in `cwd` with `path` importable; returns what it printed."""
    known = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={
            **{key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"},
            "PYTHONPATH": os.pathsep.join(filter(None, [str(path), str(ROOT), known])),
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_example_has_a_test() -> None:
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))
    found = [path.name for path in EXAMPLES.iterdir() if not path.name.startswith((".", "__"))]
    assert len(found) >= 4
    assert not [name for name in found if name not in tests]


def test_the_plain_loop_learns(tmp_path: Path) -> None:
    printed = _run(str(EXAMPLES / "plain_loop.py"), "--steps", "31", "--hidden", "32", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert not list(tmp_path.iterdir())


def test_the_trainer_leaves_a_plain_checkpoint_and_a_report(tmp_path: Path) -> None:
    sizes = ("--steps", "3", "--batch-size", "1", "--sequence-length", "16")
    _run(str(EXAMPLES / "trainer.py"), "--output", "out", *sizes, cwd=tmp_path)
    load = "from transformers import AutoModelForCausalLM as A; print(A.from_pretrained('out'))"
    assert "LlamaForCausalLM" in _run("-P", "-c", load, cwd=tmp_path)
    report = json.loads((tmp_path / "out" / "memrt" / "report.json").read_text("utf-8"))
    assert sum(report["accounts"].values()) == report["peak_bytes"] > 0


def test_the_config_file_trains(tmp_path: Path) -> None:
    smaller = (
        "training.max_steps=2",
        "per_device_train_batch_size=1",
        "data.sequence_length=16",
        "eval_strategy=no",
        "data.evaluation_fraction=0",
    )
    command = ("train", str(EXAMPLES / "train.yaml"), *smaller, "--output", "run")
    _run("-m", "memrt", *command, cwd=tmp_path)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def installed_strategy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The third party's package, installed from a copy into a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "third_party_strategy"
    shutil.copytree(EXAMPLES / "third_party_strategy", source)
    site = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site))
    _run("-m", "pip", "install", *options, str(source), cwd=source)
    return site


def test_the_third_party_strategy_passes_its_own_tests(
    installed_strategy: Path, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLES / "third_party_strategy" / "test_last_layers.py", tmp_path)
    options = ("-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:xdist")
    printed = _run("-m", "pytest", *options, ".", cwd=tmp_path, path=installed_strategy)
    assert re.search(r"\b6 passed", printed)


def test_the_command_line_knows_the_third_party_strategy(
    installed_strategy: Path, tmp_path: Path
) -> None:
    command = ("plan", "--json", "--seq", "32", "--strategies", "last_layers(count=1)")
    printed = _run("-m", "memrt", *command, cwd=tmp_path, path=installed_strategy)
    assert "last_layers(count=1)" in json.dumps(json.loads(printed))
