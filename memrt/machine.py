"""What a machine allows a training run: memory, control groups, locks, disks, a C++ compiler.

Read from the files that Linux keeps (`/proc`, `/sys/fs/cgroup`), without any package, so that it
works where nothing else does. A limit that a machine does not have is None.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Compiler",
    "MemoryLimit",
    "cgroup_limit",
    "compiler",
    "free_disk_bytes",
    "is_container",
    "is_wsl",
    "lock_limit_bytes",
    "memory_bytes",
    "return_free_memory",
]

# control groups of version 1 say "no limit" by a number near 2^63
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """The tightest limit of the control groups that this process is in."""

    limit_bytes: int
    used_bytes: int | None
    file: str


def memory_bytes(root: Path = Path("/")) -> dict[str, int]:
    """`total`, `available` and `swap` of the machine; what cannot be read is left out."""
    keys = {"MemTotal": "total", "MemAvailable": "available", "SwapTotal": "swap"}
    found = {}
    for line in _lines(root / "proc" / "meminfo"):
        name, _, rest = line.partition(":")
        if name in keys and rest.split()[:1]:
            found[keys[name]] = int(rest.split()[0]) * 1024
    return found


def return_free_memory() -> None:
    """Give the system what the C library holds and nobody uses, where it can (glibc).

    Temporaries between tensors that stay leave holes, which the library keeps: packing a model into
    int8 held twice its result.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # not on Linux
        return None


def cgroup_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """The lowest memory limit from this process's control group up to the root."""
    found: list[MemoryLimit] = []
    for limit_file, used_file in _cgroup_files(root):
        limit = _number(limit_file)
        if limit is not None and limit < _NO_LIMIT:
            shown = "/" + str(limit_file.relative_to(root))
            found.append(MemoryLimit(limit_bytes=limit, used_bytes=_number(used_file), file=shown))
    return min(found, key=lambda each: each.limit_bytes, default=None)


def _cgroup_files(root: Path) -> Iterator[tuple[Path, Path]]:
    base = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers == "":
            top, names = base, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = top / name.strip("/")
        for each in (folder, *folder.parents):
            if each == base.parent or not each.is_relative_to(top):
                break
            yield each / names[0], each / names[1]


def lock_limit_bytes() -> int | None:
    """`ulimit -l`: what a process may lock into memory by itself; None without a limit."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def free_disk_bytes(folder: Path) -> int | None:
    """Free bytes for a user without privileges; None where the folder cannot be asked."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def is_wsl(root: Path = Path("/")) -> bool:
    """Whether Linux runs inside Windows, where pinned memory is scarce."""
    return any("microsoft" in line.lower() for line in _lines(root / "proc" / "version"))


def is_container(root: Path = Path("/")) -> bool:
    """Whether this is a container, where NVML does not find a process by its number."""
    marks = (root / ".dockerenv", root / "run" / ".containerenv")
    return any(mark.exists() for mark in marks)


# ---------------------------------------------------------------- compiler


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """A C++ compiler and why it cannot build what torch.compile makes (None: it can)."""

    path: str | None
    version: str | None
    problem: str | None
    remedy: str | None = None


def compiler() -> Compiler:
    """Build one small file with OpenMP and Python's headers, as torch.compile does."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        return Compiler(
            path=None,
            version=None,
            problem="no C++ compiler on the PATH",
            remedy="install g++ (apt-get install g++), or name one in CXX",
        )
    first = _output([path, "--version"]).partition("\n")[0]
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").is_file():
        return Compiler(
            path=path,
            version=first,
            problem=f"Python's headers are missing ({include}/Python.h)",
            remedy="install them (apt-get install python3-dev)",
        )
    with tempfile.TemporaryDirectory(prefix="memrt-doctor-") as folder:
        source = Path(folder) / "a.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        built = Path(folder) / "a.out"
        error = _output([path, "-fopenmp", f"-I{include}", str(source), "-o", str(built)])
        if not built.exists():
            return Compiler(
                path=path,
                version=first,
                problem=f"it does not build a program with OpenMP: {error.partition(chr(10))[0]}",
                remedy="install libgomp (it comes with g++)",
            )
    return Compiler(path=path, version=first, problem=None)


# ---------------------------------------------------------------- reading


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
