"""The wheel: built from a clean copy, holding memrt only, and working where the checkout is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.packaging.source_tree import MAPPED, ROOT


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _files_of_the_project() -> list[str]:
    """What git knows or would add: no stale `build/`, whose files would enter the wheel."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the project is not known")
    listed = _run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT)
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in _files_of_the_project():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    _run(sys.executable, "-m", "pip", "wheel", *options, "-w", str(out), ".", cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-deps", "--no-index", "--target", str(target))
    _run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def test_the_wheel_holds_every_source_file_of_memrt_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        files = set(archive.namelist())
    metadata = {name for name in files if name.startswith("memrt-0.1.0.dist-info/")}
    expected = {
        name if name.startswith("memrt/") else f"memrt/{name}"
        for name in _files_of_the_project()
        if name.split("/")[0] in ("memrt", *MAPPED)
    }
    assert files - metadata == expected
    assert "memrt-0.1.0.dist-info/licenses/LICENSE" in metadata


def test_the_metadata_is_what_an_index_shows(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        metadata = archive.read("memrt-0.1.0.dist-info/METADATA").decode()
        scripts = archive.read("memrt-0.1.0.dist-info/entry_points.txt").decode()
        top_level = archive.read("memrt-0.1.0.dist-info/top_level.txt").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert (ROOT / "README.md").read_text("utf-8").strip() in metadata
    assert "memrt = memrt.cli.main:main" in scripts
    assert top_level.split() == ["memrt"]


IMPORT_INSTALLED = """
import importlib, pkgutil, sys
from pathlib import Path

site = sys.argv[1]
sys.path.insert(0, site)
import memrt

for name in memrt.__all__:
    getattr(memrt, name)
for found in pkgutil.walk_packages(memrt.__path__, "memrt."):
    if "_triton" not in found.name and not found.name.endswith("__main__"):
        module = importlib.import_module(found.name)
        assert module.__file__.startswith(site + "/memrt/"), module.__file__
        print(found.name)
"""


def test_the_installed_wheel_imports_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    found = _run(sys.executable, "-P", "-c", IMPORT_INSTALLED, str(installed), cwd=tmp_path)
    assert {"memrt.strategies.galore", "memrt.cli.main", "memrt.testing"} <= set(found.split())


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); sys.argv = ['memrt', '--help']\n"
    code += "from memrt.cli.main import main; sys.exit(main())"
    assert "compare" in _run(sys.executable, "-P", "-c", code, cwd=tmp_path)
