"""What the scripts here share: a tiny Llama, short Trainer runs, and a verdict with its exit code.

Exit codes: 0 the defect is still there, 2 a package is missing, 3 it is gone.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

STILL_THERE, MISSING, GONE = 0, 2, 3


def verdict(still_there: bool, *, packages: Sequence[str], seen: str) -> NoReturn:
    """Say what was seen with which versions, and leave."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{versions}: {seen}")
    print("STILL THERE" if still_there else "GONE")
    sys.exit(STILL_THERE if still_there else GONE)


def require(package: str, *, distribution: str) -> None:
    """Leave with a sentence where a package is not installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        print(f"{package} is not installed; run: pip install {distribution}")
        sys.exit(MISSING)


def tiny_llama() -> Any:
    """A Llama of a few thousand weights, always the same."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def examples(count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Random tokens, always the same."""
    rows = torch.randint(64, (count, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def folder() -> Path:
    """A new folder for a run."""
    return Path(tempfile.mkdtemp(prefix="known-wrong-"))


def trainer(
    where: Path, model: Any | None = None, *, rows: Sequence[Any] | None = None, **options: Any
) -> Any:
    """transformers' own Trainer, six steps on the CPU, a checkpoint every third."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(where),
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 3,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **options,
        }
    )
    made = transformers.Trainer(
        model=tiny_llama() if model is None else model,
        args=arguments,
        train_dataset=examples() if rows is None else rows,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def difference(first: Any, second: Any) -> float:
    """The largest difference of two models' weights."""
    others = second.state_dict()
    pairs = ((tensor, others[name]) for name, tensor in first.state_dict().items())
    return max(float((one - other).abs().max()) for one, other in pairs)


def gradient_norms(run: Any) -> list[float]:
    """What a run logged as `grad_norm`."""
    return [float(entry["grad_norm"]) for entry in run.state.log_history if "grad_norm" in entry]
