"""Where data comes from: which of the formats a path means, and a text as one stream.

A ``.txt`` file is one text stream, blank lines kept. Everything else is records with named columns
(``memrt.data_records``): ``.jsonl``, ``.csv``, ``.tsv`` and ``.parquet`` files, and datasets of the
Hugging Face Hub. The suffix decides: a path with a suffix of letters is a file, whatever its name
looks like, and ``owner/name`` without one, or with ``:split`` at its end, is a dataset of the Hub.
Files are streamed: one line, one piece of a text or one batch of rows is in memory at a time.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memrt.data_tables import read_lines
from memrt.tokenization import embedded_text

__all__ = [
    "FORMATS",
    "HUB_DATASET",
    "SOURCES",
    "TextStream",
    "is_hub_dataset",
    "is_stream",
    "require_file",
]

FORMATS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
SOURCES = f"a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or a dataset of the Hub (owner/name)"

HUB_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[^/\\]+))?")
"""``owner/name``, or ``owner/name:split``."""

# Fast tokenizers keep offsets and strings for all tokens of a call, over 100 bytes a token: a text
# is tokenised in pieces of about this size, which keeps that at a few MB.
_PIECE_CHARACTERS = 65536
_LETTER_SUFFIX = re.compile(r"\.[A-Za-z]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStream:
    """A ``.txt`` file, or the embedded text where ``path`` is None."""

    path: str | None

    @property
    def name(self) -> str:
        return "the embedded text (pydoc_data.topics)" if self.path is None else self.path

    @property
    def kind(self) -> Literal["text"]:
        return "text"

    @property
    def place(self) -> Literal["line"]:
        return "line"

    def check(self) -> None:
        """Reads every line, so that all of it is known to be UTF-8."""
        if self.path is not None and not sum(
            1 for _, line in read_lines(self.path) if line.strip()
        ):
            raise ValueError(f"{self.path}: the file is empty or blank; it must hold text")

    def pieces(self) -> Iterator[str]:
        """The text in pieces that end before a line that starts with a visible character.

        Byte-level pre-tokenizers (GPT-2, Llama 3, Qwen) split there anyway, so that the tokens are
        those of the whole text at once; a SentencePiece one may differ by a token a piece.
        """
        if self.path is None:
            lines: Iterable[str] = io.StringIO(embedded_text())
        else:
            lines = (line for _, line in read_lines(self.path))
        held: list[str] = []
        held_characters = 0
        for line in lines:
            if held_characters >= _PIECE_CHARACTERS and not line[0].isspace():
                yield "".join(held)
                held, held_characters = [], 0
            held.append(line)
            held_characters += len(line)
        if held:
            yield "".join(held)


def is_hub_dataset(path: str) -> bool:
    """Whether a path means a dataset of the Hub; the file system is not asked."""
    found = HUB_DATASET.fullmatch(path)
    if found is None or path.split("/")[0] in (".", ".."):
        return False
    return found["split"] is not None or not _LETTER_SUFFIX.fullmatch(Path(path).suffix)


def is_stream(path: str | None, argument: str) -> bool:
    """Whether this is one text (True) or records (False); refuses any other file."""
    if path is not None and is_hub_dataset(path):
        return False
    suffix = ".txt" if path is None else Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{argument}={path!r}: must be {SOURCES}")
    return suffix == ".txt"


def require_file(path: str, argument: str) -> None:
    """Refuse a file that is not there; a dataset of the Hub must not be a local path too."""
    local = Path(path)
    if is_hub_dataset(path):
        if local.exists():
            problem = "folder" if local.is_dir() else "file without a suffix"
            raise ValueError(
                f"{argument}={path!r}: this is a {problem}; name a {' or '.join(FORMATS)} file"
            )
        return
    if not local.is_file():
        problem = "this is a folder" if local.is_dir() else "there is no such file"
        raise ValueError(
            f"{argument}={path!r}: {problem}; give {SOURCES} (relative paths start at {Path.cwd()})"
        )
