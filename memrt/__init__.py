"""memrt: a memory-efficient training runtime for PyTorch.

``import memrt`` is cheap: public names load their modules on first use, so that neither
transformers, triton nor CUDA is touched before it is needed.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# pyproject's package-dir puts memrt.kernels, memrt.optimizers and memrt.profiling here when memrt
# is installed; in a checkout they lie one folder up, beside memrt/.
_here = Path(__file__).parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from memrt.arguments import TrainingArguments
    from memrt.auto import choose
    from memrt.callback import MemoryProfilerCallback
    from memrt.ladder_files import load_ladder, save_ladder
    from memrt.loading import load
    from memrt.plain_loop import prepare
    from memrt.planning import plan
    from memrt.registry import register
    from memrt.session import Session
    from memrt.strategy import Attachment, Strategy
    from memrt.trainer import MemoryMixin, Trainer

__version__ = "0.1.0"

_PUBLIC = {
    "Attachment": "memrt.strategy",
    "MemoryMixin": "memrt.trainer",
    "MemoryProfilerCallback": "memrt.callback",
    "Session": "memrt.session",
    "Strategy": "memrt.strategy",
    "Trainer": "memrt.trainer",
    "TrainingArguments": "memrt.arguments",
    "choose": "memrt.auto",
    "load": "memrt.loading",
    "load_ladder": "memrt.ladder_files",
    "plan": "memrt.planning",
    "prepare": "memrt.plain_loop",
    "register": "memrt.registry",
    "save_ladder": "memrt.ladder_files",
}

__all__ = [
    "Attachment",
    "MemoryMixin",
    "MemoryProfilerCallback",
    "Session",
    "Strategy",
    "Trainer",
    "TrainingArguments",
    "__version__",
    "choose",
    "load",
    "load_ladder",
    "plan",
    "prepare",
    "register",
    "save_ladder",
]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'memrt' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
