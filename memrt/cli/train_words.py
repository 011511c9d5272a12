"""The words after `memrt train`: a config file, `key=value`, `--key value`, and a few options.

argparse is not asked: its options are a fixed list, and here every setting is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memrt.cli.arguments import UsageError
from memrt.cli.train_keys import Key, find_key, keys

__all__ = ["OPTIONS", "Words", "parse_words"]

OPTIONS = {
    "--help": "this text",
    "--print-config": "write the settings as YAML, defaults filled in, and stop",
    "--config FILE": "the same as FILE alone",
    "--resume [FOLDER]": "go on from the last checkpoint in output, or from the run or checkpoint "
    "that is named; without a config file the settings of that run are taken",
    "--overwrite": "when output holds another run: rename that to output.1 (2, ...) and start anew",
    "--json": "print the report as JSON on stdout, and nothing else",
    "--traceback": "show where an error was raised in the code",
}

_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.\-]*)=(.*)", re.DOTALL)
_CONFIG_SUFFIXES = (".yaml", ".yml")
_SWITCH_VALUES = ("true", "false", "null", "auto")


@dataclass(slots=True, kw_only=True)
class Words:
    """What was typed; `settings` are names as typed, with one text or, for lists, several."""

    config: str | None = None
    settings: list[tuple[str, list[str]]] = field(default_factory=list)
    resume: bool = False
    resume_from: str | None = None
    overwrite: bool = False
    json: bool = False
    print_config: bool = False
    help: bool = False


def parse_words(words: Sequence[str]) -> Words:
    """Sort the words; the values of settings are not looked at."""
    parsed = Words()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        assignment = _ASSIGNMENT.fullmatch(word)
        if word == "-h" or word.startswith("--"):
            _take_flag(word, rest, parsed)
        elif assignment:
            parsed.settings.append((assignment[1], [assignment[2]]))
        elif word.startswith("-"):
            raise UsageError(f"unknown argument {word!r}; settings are key=value or --key value")
        else:
            _take_config(word, parsed)
    if parsed.resume and parsed.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite starts anew; give one")
    return parsed


def _take_config(path: str, parsed: Words) -> None:
    if parsed.config is not None:
        raise UsageError(
            f"unexpected {path!r} after the config file {parsed.config!r}; "
            "settings are key=value or --key value"
        )
    parsed.config = path


def _take_flag(word: str, rest: list[str], parsed: Words) -> None:
    name, equals, value = word.partition("=")
    switches = {
        "-h": "help",
        "--help": "help",
        "--print-config": "print_config",
        "--overwrite": "overwrite",
        "--json": "json",
        "--traceback": None,  # `memrt.cli.main` looks for it
    }
    if name in switches:
        if equals:
            raise UsageError(f"{name} takes no value; write {name}")
        if switches[name] is not None:
            setattr(parsed, str(switches[name]), True)
    elif name == "--config":
        _take_config(value if equals else _next_value(name, rest), parsed)
    elif name == "--resume":
        parsed.resume = True
        if equals:
            parsed.resume_from = value
        elif rest and _is_value(rest[0]):
            parsed.resume_from = rest.pop(0)
    else:
        key = keys().get(find_key(name.removeprefix("--")))
        values = [value] if equals else _values(name, key, rest)
        parsed.settings.append((name.removeprefix("--"), values))


def _is_value(word: str) -> bool:
    return (
        not word.startswith("--")
        and not _ASSIGNMENT.fullmatch(word)
        and Path(word).suffix not in _CONFIG_SUFFIXES
    )


def _next_value(name: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"{name} needs a value")
    return rest.pop(0)


def _values(name: str, key: Key | None, rest: list[str]) -> list[str]:
    """The words that belong to a flag: one, several for a list, none for a switch."""
    expected = "" if key is None else key.expected
    if "true or false" in expected and (not rest or rest[0].lower() not in _SWITCH_VALUES):
        return ["true"]
    found = [_next_value(name, rest)]
    while "a list" in expected and rest and _is_value(rest[0]):
        found.append(rest.pop(0))
    return found
