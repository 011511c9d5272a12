"""What `memrt train --help` prints: how to call it, and every setting with its type and default."""

from __future__ import annotations

import textwrap
from typing import Any

from memrt.cli.train_keys import ALIASES, SECTIONS, Key, keys
from memrt.cli.train_words import OPTIONS

__all__ = ["help_text"]

_WIDTH = 100

_USAGE = """\
usage: memrt train [FILE.yaml] [key=value ...] [--key value ...] [options]

A full fine-tune of a causal language model or a classifier of texts: evaluation, checkpoints,
resume, the memory predicted before and reported after. Leaves a plain transformers folder, or
adapters in PEFT's layout.

  memrt train                                     the embedded Llama on the embedded text, 50 steps
  memrt train config.yaml                         settings from a file
  memrt train config.yaml training.learning_rate=1e-4 --strategies lisa int8_states
  memrt train --model ./my-model --data my.jsonl --lr 1e-5 --epochs 1 --output run
  memrt train --model ./my-bert --task sequence-classification --data films.csv --label-column label
  memrt train config.yaml --resume

Settings are a tree of two levels, in YAML as sections, on the command line as section.key=value or
--section.key value. The last part alone will do where it is in one section. Words win over the
file. Lists take several words: --strategies lisa "galore(rank=64)". In YAML ${oc.env:NAME} is an
environment variable.

Exit codes: 0 done, 1 error, 130 interrupted (says how to go on).
"""


def help_text() -> str:
    """The whole page."""
    parts = [_USAGE, "options:\n" + _table(list(OPTIONS.items()))]
    parts.append("the run:\n" + _section(""))
    parts += [f"{section}:\n" + _section(section) for section in SECTIONS]
    short = [(f"--{short}", full) for short, full in ALIASES.items()]
    parts.append("short flags:\n" + _table(short))
    return "\n".join(parts).rstrip("\n")


def _section(section: str) -> str:
    rows = []
    for name, key in keys().items():
        if name.rpartition(".")[0] == section:
            rows.append((name.rpartition(".")[2], _described(key)))
    return _table(rows)


def _described(key: Key) -> str:
    text = " ".join(key.help.split()).rstrip(".")
    if key.name.startswith("training."):  # transformers' texts are paragraphs
        text = text.partition(". ")[0]
    if len(text) > 2 * _WIDTH:
        text = text[: 2 * _WIDTH].rpartition(" ")[0] + " ..."
    return f"{text}. {key.expected.capitalize()}; default {_shown(key.default)}"


def _shown(value: Any) -> str:
    value = getattr(value, "value", value)
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(value) if value in ("", []) else str(value)


def _table(rows: list[tuple[str, str]]) -> str:
    lines = []
    for name, text in rows:
        start = f"  {name:<28}"
        body = textwrap.wrap(text, _WIDTH - 32) or [""]
        if len(name) > 28:
            lines.append(f"  {name}")
            start = " " * 30
        lines.append(f"{start}  {body[0]}")
        lines += [" " * 32 + line for line in body[1:]]
    return "\n".join(lines) + "\n"
