"""What goes along with exported weights: a tokenizer's files, chat templates, generation settings.

The checkpoint's own files come before those of the base that adapters belong to. A tokenizer with
several chat templates has a folder of them, the one folder that goes along.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["other_files"]

_TEMPLATES = "additional_chat_templates"
_GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer_config.json"

# beside a base model's weights, what a user of the model needs
_BASE_FILES = (
    "tokenizer.json",
    _TOKENIZER,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    _GENERATION,
)


def other_files(
    folder: Path, *, base: str | Path | None, has_adapters: bool, skip: Sequence[str]
) -> dict[str, Path]:
    """By their names in the export; `base` is a folder or of the Hub, None for a loaded model.

    `skip`: patterns of the checkpoint's files that stay behind. A generation config is among them,
    for one beside adapters is not the model's.
    """
    found: dict[str, Path] = {}
    if not has_adapters:
        found |= _there(folder, [_GENERATION])
    elif base is not None:
        has_tokenizer = (folder / _TOKENIZER).is_file()
        found |= _base_files(str(base), with_templates=not has_tokenizer)
    for path in _files(folder):
        card = has_adapters and path.name == "README.md"  # of the adapter, not of the model
        if not card and not any(fnmatch(path.name, each) for each in skip):
            found[str(path.relative_to(folder))] = path
    return found


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted((*folder.iterdir(), *(folder / _TEMPLATES).glob("*.jinja"))):
        if path.is_file():
            yield path


def _base_files(base: str, *, with_templates: bool) -> dict[str, Path]:
    names = [*_BASE_FILES, *(_templates(base) if with_templates else ())]
    if Path(base).is_dir():
        return _there(Path(base), names)
    paths = {name: _cached(base, name) for name in names}
    return {name: path for name, path in paths.items() if path is not None}


def _there(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    return {name: folder / name for name in names if (folder / name).is_file()}


def _templates(base: str) -> list[str]:
    if Path(base).is_dir():
        return [f"{_TEMPLATES}/{path.name}" for path in (Path(base) / _TEMPLATES).glob("*.jinja")]
    from transformers.utils import list_repo_templates

    found = list_repo_templates(base, local_files_only=False)
    return [f"{_TEMPLATES}/{name.removesuffix('.jinja')}.jinja" for name in found]


def _cached(name: str, filename: str) -> Path | None:
    """A file of a Hub repository, which was fetched with the weights or is fetched now."""
    from transformers.utils import cached_file

    found = cached_file(name, filename, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
