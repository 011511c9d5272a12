"""The project's source as syntax trees, for the tests of its rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("kernels", "optimizers", "profiling")
"""Folders at the root that are packages inside `memrt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported module of one import statement."""

    target: str
    line: int
    deferred: bool
    """Inside a function, so that it runs only when the function does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A source file of the installed packages."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def where(self) -> str:
        """The path from the root, as a message shows it."""
        return self.path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """The import name of a file of the four packages."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in MAPPED:
        parts = ("memrt", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def source_modules() -> tuple[Module, ...]:
    """Every module that is installed."""
    paths = sorted(path for top in ("memrt", *MAPPED) for path in (ROOT / top).rglob("*.py"))
    return tuple(
        Module(name=module_name(path), path=path, tree=ast.parse(path.read_text("utf-8")))
        for path in paths
    )


def other_files() -> Iterator[Path]:
    """Python files that are not installed."""
    for top in ("tests", "benchmarks", "examples"):
        yield from sorted((ROOT / top).rglob("*.py"))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST, *, name: str = "", deferred: bool = False) -> Iterator[Import]:
    """The imports that run; those under `TYPE_CHECKING` do not.

    `from package import name` yields `package.name`: whoever asks knows whether that is a module.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(target=alias.name, line=node.lineno, deferred=deferred)
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                parents = name.split(".")[: -node.level]
                package = ".".join([*parents, *([package] if package else [])])
            for alias in node.names:
                yield Import(target=f"{package}.{alias.name}", line=node.lineno, deferred=deferred)
        elif _is_type_checking(node):
            assert isinstance(node, ast.If)
            for child in node.orelse:
                yield from imports(child, name=name, deferred=deferred)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, name=name, deferred=deferred or inside)
