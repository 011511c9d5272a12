"""Report folders: written whole or not at all, and never over another run's files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ReportFolder", "require_writable"]

_REPORT = "report.json"


def require_writable(folder: Path, argument: str) -> None:
    """Refuse a folder that nothing can be made in, or its nearest parent where it is not there.

    By making something: who is root, a disk that is mounted to be read, and /proc answer every
    other question wrong.
    """
    parent = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".memrt-", dir=parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{argument}: {parent} cannot be written to ({error.strerror}); name another folder"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFolder:
    """A folder that was found fit to hold a report of `kind` before the run began."""

    path: Path
    kind: str
    force: bool

    @classmethod
    def claim(cls, path: str, *, kind: str, force: bool) -> ReportFolder:
        """Refuse a folder that this report must not go to; touches nothing."""
        folder = cls(path=Path(path), kind=kind, force=force)
        folder._check()
        return folder

    def write(self, files: Mapping[str, str]) -> str | None:
        """Write the files; returns where an earlier report went, if there was one."""
        self._check()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._write(files)
        except OSError as error:
            raise OSError(
                f"the report could not be written to {self.path} "
                f"({error.strerror or error}); nothing was overwritten: free space or name "
                "another folder with --output"
            ) from error

    def _write(self, files: Mapping[str, str]) -> str | None:
        # beside the target, so that the rename stays on one file system
        temporary = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        try:
            for name, text in files.items():
                _write_durably(temporary / name, text)
            if self._holds_files() and not self._holds_own_report():
                for name in files:
                    os.replace(temporary / name, self.path / name)
                return None
            temporary.chmod(0o777 & ~_umask())
            kept = self._move_aside()
            os.rename(temporary, self.path)
            return kept
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _move_aside(self) -> str | None:
        if not self.path.exists():
            return None
        if not self._holds_files():
            self.path.rmdir()
            return None
        number = 1
        while (kept := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        os.rename(self.path, kept)
        return str(kept)

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output {self.path}: this is a file; name a folder")
        if self._holds_files() and not self._holds_own_report() and not self.force:
            raise ValueError(
                f"--output {self.path}: the folder holds files that are no report of "
                f"`memrt {self.kind}`; name another folder, or pass --force to write into it"
            )
        require_writable(self.path.absolute().parent, f"--output {self.path}")

    def _holds_files(self) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def _holds_own_report(self) -> bool:
        try:
            report = json.loads((self.path / _REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return (
            isinstance(report, dict)
            and str(report.get("schema", "")).startswith("memrt.report/")
            and report.get("kind") == self.kind
        )


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
