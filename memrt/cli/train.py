"""`memrt train`: a full fine-tune with evaluation, checkpoints, resume, and the report."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memrt.cli.train_config import TrainConfig
    from memrt.cli.train_words import Words

__all__ = ["add_parser", "run"]

_NOT_A_PREFIX = "\0"
"""With this as argparse's prefix every word reaches `memrt.cli.train_words` in its order."""


def add_parser(subparsers: Any) -> None:
    """Declare the command. Its settings are a tree that argparse does not know."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="a full fine-tune with evaluation, checkpoints, resume, and the report",
        prefix_chars=_NOT_A_PREFIX,
        add_help=False,
    )
    parser.add_argument("words", nargs="*")


def run(arguments: argparse.Namespace) -> int:
    """Settings from the words, then one training run."""
    from memrt.cli.train_run import TrainRun
    from memrt.cli.train_words import parse_words

    words = parse_words(arguments.words)
    if words.help:
        from memrt.cli.train_help import help_text

        print(help_text())
        return 0
    settings = _settings(words)
    if words.print_config:
        print(settings.to_yaml(), end="")
        return 0
    session = TrainRun(settings, words)
    try:
        session.train()
    except KeyboardInterrupt:
        print(_how_to_go_on(arguments.words, words, session.last_checkpoint()), file=sys.stderr)
        raise
    return 0


def _settings(words: Words) -> TrainConfig:
    """Of the file and the words; of the run that is resumed where no file is named."""
    from memrt.cli.train_config import TrainConfig, folder_of, resolve
    from memrt.cli.train_folder import RunFolder, run_of
    from memrt.cli.train_keys import find_key, keys

    base = None
    if words.resume and words.config is None:
        named = [texts[0] for name, texts in words.settings if find_key(name) == "output"]
        start = folder_of(words.resume_from or (named or [keys()["output"].default])[-1])
        base = RunFolder.settings_of(start)
        if base is not None:
            base = TrainConfig({**base.values, "output": str(run_of(start))})
    return resolve(words.config, words.settings, base=base)


def _how_to_go_on(typed: list[str], words: Words, checkpoint: str | None) -> str:
    if checkpoint is None:
        return "no checkpoint was saved yet; run the same command again to start anew"
    kept = [word for word in typed if word != "--overwrite"]
    if words.resume:
        place = next(n for n, word in enumerate(kept) if word.partition("=")[0] == "--resume")
        named = words.resume_from
        del kept[place : place + (2 if named is not None and kept[place] == "--resume" else 1)]
    # a checkpoint that was named is older than what was saved since, or of another run
    newest = [] if words.resume_from is None else [checkpoint]
    return f"saved up to {checkpoint}; go on with: memrt train " + shlex.join(
        [*kept, "--resume", *newest]
    )
