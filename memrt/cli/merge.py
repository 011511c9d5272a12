"""`memrt merge ADAPTER --base MODEL OUTPUT`: a PEFT adapter folded into its base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memrt.cli.arguments import add_command
from memrt.cli.export import add_export_flags, export

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Fold an adapter into the model that it was trained on, and write the result as a plain Hugging Face
folder: PEFT's folders, and checkpoints of memrt runs with peft, over dense or packed (nf4, int8)
weights. Base and adapter are read and written one module at a time; methods that read the base's
weights (DoRA, PiSSA, LoHa, ...) and adapters on a mixture's experts load the base whole, once.

  memrt merge run/checkpoint-500 --base meta-llama/Llama-3.2-1B merged --verify

A checkpoint-N of a run over packed weights is folded into the rounded weights that it was trained
on; a run's own folder, like PEFT's, does not tell of them and is folded into the base as it is. A
ladder's side network cannot be folded into any weight.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "merge",
        summary="a PEFT adapter folded into its base",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="a folder with adapter_model.safetensors"
    )
    parser.add_argument("output", metavar="OUTPUT", help="a new or empty folder")
    parser.add_argument(
        "--base",
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="the model that the adapter was trained on",
    )
    add_export_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Fold and say what was written."""
    from memrt.adapters import has_adapter_files

    folder = Path(arguments.adapter)
    others = ("ladder.json", "adapter_model.bin", "memrt_state.json")
    told = any((folder / name).is_file() for name in others)  # with a sentence of its own
    if folder.is_dir() and not has_adapter_files(folder) and not told:
        raise ValueError(
            f"{arguments.adapter} holds no adapter_model.safetensors; name an adapter's folder, or "
            "use memrt export for a checkpoint with whole weights"
        )
    return export(arguments.adapter, arguments)
