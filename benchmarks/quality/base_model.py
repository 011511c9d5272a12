"""The base language model that comparisons of quality start from: one seeded, resumable command.

    MEMRT_DATA=folder python -m benchmarks.quality.base_model FOLDER

trains the Llama of `base_model.yaml` from random weights on `wikitext2-test.txt` and
`tinyshakespeare.txt` and evaluates it on `wikitext2-valid.txt`. FOLDER/model is then a plain
transformers folder with its tokenizer. Run again after an interruption, it goes on from the last
checkpoint, to the same weights; run again after its end, it says so and does nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from memrt.cli.main import main as memrt

__all__ = ["TRAINING_TEXTS", "main", "train_base_model"]

CONFIGURATION = Path(__file__).with_suffix(".yaml")
TRAINING_TEXTS = ("wikitext2-test.txt", "tinyshakespeare.txt")
EVALUATION_TEXT = "wikitext2-valid.txt"


def train_base_model(folder: Path, data: Path, overrides: Sequence[str] = ()) -> int:
    """Train, go on, or find it done; the exit code of `memrt train`."""
    run = folder / "model"
    if (run / "model.safetensors").is_file():
        print(f"{run} is trained", file=sys.stderr)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_bytes(b"\n".join((data / name).read_bytes() for name in TRAINING_TEXTS))
    words = [
        *("train", str(CONFIGURATION), "--output", str(run)),
        *("--data", str(text), f"data.evaluation_path={data / EVALUATION_TEXT}"),
        *overrides,
    ]
    return memrt([*words, "--resume"] if any(run.glob("checkpoint-*")) else [*words, "--overwrite"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.base_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where text, checkpoints and model go")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for `memrt train`"
    )
    arguments = parser.parse_args(argv)
    data = os.environ.get("MEMRT_DATA")
    if not data or not all((Path(data) / name).is_file() for name in TRAINING_TEXTS):
        parser.error(f"MEMRT_DATA={data!r} must name a folder with {' and '.join(TRAINING_TEXTS)}")
    return train_base_model(arguments.folder, Path(data), arguments.overrides)


if __name__ == "__main__":
    sys.exit(main())
