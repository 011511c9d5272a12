"""The folders on disk, the packages that pyproject lists, and the names they import under."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAPPED = ("kernels", "optimizers", "profiling")
"""Folders at the root that are packages inside `memrt`."""


def _packages_on_disk() -> set[str]:
    found = set()
    for top in ("memrt", *MAPPED):
        for folder in (ROOT / top, *(ROOT / top).rglob("*/")):
            if any(folder.glob("*.py")):
                dotted = ".".join(folder.relative_to(ROOT).parts)
                found.add(dotted if top == "memrt" else f"memrt.{dotted}")
    return found


def test_pyproject_lists_every_package_on_disk_and_no_other() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == _packages_on_disk()


def test_mapped_folders_are_mapped_and_none_is_a_regular_package() -> None:
    mapping = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert mapping == {f"memrt.{folder}": folder for folder in MAPPED}
    # an __init__.py here makes `import kernels` find us in place of Hugging Face's package
    assert not [folder for folder in MAPPED if (ROOT / folder / "__init__.py").exists()]


def test_the_links_that_serve_mypy_lead_to_the_folders() -> None:
    links = {path.name: path.resolve() for path in (ROOT / ".typing" / "memrt").iterdir()}
    assert links == {folder: ROOT / folder for folder in MAPPED}


def test_no_module_has_the_name_of_a_package_beside_it() -> None:
    """`memrt/kernels.py` would shadow the folder that is appended to the path."""
    assert not [folder for folder in MAPPED if (ROOT / "memrt" / f"{folder}.py").exists()]


IMPORT_ALL = """
import importlib, sys

root, names = sys.argv[1], sys.argv[2:]
sys.path.insert(0, root)
for name in names:
    module = importlib.import_module(name)
    assert module.__name__ == name, (name, module.__name__)
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
ours = [file for file in files if file.startswith(root + "/")]
assert len(ours) == len(set(ours)), "a file was imported under two names"
"""


def test_every_module_imports_under_its_own_name_from_an_empty_folder(tmp_path: Path) -> None:
    """One process imports them all, so that a second copy of a module would show."""
    names = sorted(
        f"{package}.{path.stem}"
        for package in _packages_on_disk()
        for path in _folder(package).glob("*.py")
        if not path.stem.startswith("__") and "_triton" not in package  # triton need not be there
    )
    assert len(names) > 30
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_ALL, str(ROOT), *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _folder(package: str) -> Path:
    parts = package.split(".")
    inside_memrt = len(parts) == 1 or parts[1] not in MAPPED
    return ROOT.joinpath(*parts if inside_memrt else parts[1:])


def test_version_is_written_once() -> None:
    import memrt

    assert PYPROJECT["project"]["version"] == memrt.__version__
