"""`memrt.load`: a model built on meta, then filled one tensor at a time through the strategies.

Each weight is read (or drawn), cast, handed to every strategy's `place_weight` in phase order, put
in place, and its source dropped. Peak, host and device together: the result plus the largest single
tensor as it is stored; the ledger shows it in phase "load". Exceptions, with their sizes: random
weights that transformers draws together (`memrt.initialization`), fused experts
(`memrt.weight_files`).

Equal bit for bit to transformers: a folder with weights to `from_pretrained` (and, like that, in
evaluation mode), a config to `torch.manual_seed(seed); from_config(config)` (in training mode).
"""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import logging as transformers_logging

from memrt import registry
from memrt.checkpoint_weights import Checkpoint, refuse_unknown
from memrt.initialization import Skeleton, initialize
from memrt.model_source import auto_class, brings_code, resolve_config, weight_source
from memrt.profiling.fake import is_fake
from memrt.quantization import with_quantization
from memrt.structure import Facts, RunSettings, discover
from memrt.weight_files import WeightFiles
from memrt.weight_slots import WeightSlots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from memrt.profiling.ledger import Ledger
    from memrt.strategy import Loading, Strategy

__all__ = ["auto_class", "load", "resolve_config"]

_CODE_PACKAGE = "transformers_modules."
_REMEDY = "use from_pretrained or from_config and memrt.prepare"


def load(
    path_or_config: Any,
    strategies: Sequence[str | Strategy | Mapping[str, Any]] = (),
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    task: str | None = None,
    ledger: Ledger | None = None,
    config: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Load a transformers model so that it is never whole before the strategies had each weight.

    `path_or_config`: a folder (with safetensors, or with `config.json` alone: random weights), a
    `config.json` or config object (random weights), or a Hub id. `dtype`: the weights', or None
    for the config's, else the checkpoint's. `task`: one of `memrt.model_source.TASKS`, or None for
    what the config names. `seed`: for the weights that are drawn; None draws from the global
    generator. `config`: instead of the one beside the weights, such as one with other labels.
    `quantization_config`: a `BitsAndBytesConfig` that means `nf4` (`memrt.quantization`).
    `trust_remote_code`: run Python code that the model brings; also where its config, made with
    trust, is given. Buffers do not pass the strategies. Under `fake_tensors()` nothing is read or
    drawn. Pass the `ledger` that is entered, and its weights account grows with each tensor.
    """
    stack = registry.parse_all(strategies)
    target = _resolved_device(device)
    with _quiet(), torch.no_grad(), ExitStack() as context:
        if ledger is not None:
            context.enter_context(ledger.phase("load"))
        config = _own_config(path_or_config, config, trust_remote_code=trust_remote_code)
        auto = auto_class(config, task)
        trusted = _trusted(config, auto, path_or_config, trust_remote_code)
        source = weight_source(path_or_config, config)
        files = None if source is None else context.enter_context(WeightFiles(source))
        chosen = _resolved_dtype(dtype, config, files)
        stack = with_quantization(stack, quantization_config, dtype=chosen)
        skeleton = Skeleton.build(
            lambda: auto.from_config(config, dtype=chosen, trust_remote_code=trusted)
        )
        if files is None:  # nobody can look up random weights by a name
            skeleton.model.config.name_or_path = skeleton.model.name_or_path = ""
        parts = _parts(skeleton.model, stack)
        slots = WeightSlots(skeleton.model, parts, device=target, ledger=ledger)
        if progress:
            slots.on_placed = _bar(context, slots.num_tensors)
        context.enter_context(_seeded(seed, target))
        if files is None:
            notes = _draw(skeleton, slots, dtype=chosen, device=target)
        else:
            notes = _read(path_or_config, skeleton, slots, files, dtype=chosen, device=target)
        slots.tie()
        for part in parts:
            part.finish()
    for note in notes:
        warnings.warn(f"{path_or_config}: {note}", stacklevel=2)
    model: nn.Module = skeleton.model
    return model


def _parts(model: nn.Module, stack: Sequence[Strategy]) -> list[Loading]:
    """What the strategies do while the model loads; they may refuse it."""
    facts = Facts(model=model, structure=discover(model), settings=RunSettings())
    return [strategy.loading(facts) for strategy in stack]


def _draw(
    skeleton: Skeleton, slots: WeightSlots, *, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Random weights, as `from_config` draws them."""
    if is_fake(torch.empty(0)):  # nobody asks for values, which may lie in a checkpoint
        for name in skeleton.never_written():
            slots.materialise(name)
            slots.place(name)
    else:
        refuse_unknown(skeleton, set(slots.meta))
    with local_torch_dtype(dtype):
        initialize([*skeleton.events()], slots, wanted=slots.meta.keys(), device=device)
    return []


def _read(
    path: str | Path,
    skeleton: Skeleton,
    slots: WeightSlots,
    files: WeightFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[str]:
    """A checkpoint's weights, as `from_pretrained` loads them."""
    model = skeleton.model
    if type(model).from_pretrained.__func__ is not PreTrainedModel.from_pretrained.__func__:
        raise ValueError(f"{type(model).__name__} has a way of loading of its own; {_REMEDY}")
    notes = Checkpoint(skeleton, slots, files, dtype).load(device)
    model.config.name_or_path = model.name_or_path = str(path)
    model.eval()
    if model.can_generate():
        model.generation_config = _generation_config(str(path))
    return notes


def _generation_config(path: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # no generation_config.json: older checkpoints keep it in config.json
        return GenerationConfig.from_pretrained(
            path, config_file_name="config.json", _from_model_config=True
        )


def _own_config(path_or_config: Any, config: Any, *, trust_remote_code: bool) -> Any:
    """A copy of the model's config, for the model changes its own."""
    if config is None:
        config = resolve_config(path_or_config, trust_remote_code=trust_remote_code)
    config = copy.deepcopy(config)
    _refuse(config)
    return config


def _refuse(config: Any) -> None:
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"memrt.load cannot build what DeepSpeed ZeRO-3 cuts up; {_REMEDY}")
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        get = quantised.get if isinstance(quantised, dict) else vars(quantised).get
        raise ValueError(
            f"the config says that its weights are quantised ({get('quant_method')}); {_REMEDY}"
        )


def _trusted(config: Any, auto: Any, path_or_config: Any, trust_remote_code: bool) -> bool:
    """Whether code that the model brings may run; refuses a model that is nothing without."""
    # code of its config has run already, which took trust
    if trust_remote_code or type(config).__module__.startswith(_CODE_PACKAGE):
        return True
    problem = brings_code(config, auto)
    if problem is not None:
        raise ValueError(f"{path_or_config}: {problem}")
    return False


def _bar(context: ExitStack, total: int) -> Callable[[], None]:
    bar = context.enter_context(Progress(console=Console(stderr=True), transient=True))
    weights = bar.add_task("loading weights", total=total)
    return lambda: bar.advance(weights)


def _resolved_dtype(dtype: Any, config: Any, files: WeightFiles | None) -> torch.dtype:
    wanted = config.dtype if dtype in (None, "auto") else dtype
    if wanted is None:
        return torch.get_default_dtype() if files is None else files.common_dtype()
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r}: must be a floating-point dtype such as torch.bfloat16, or 'auto'"
        )
    return found


def _resolved_device(device: str | torch.device | None) -> torch.device:
    found = torch.get_default_device() if device is None else torch.device(device)
    if found.type == "meta":
        raise ValueError(
            "device='meta' would load nothing; for shapes without memory call memrt.load inside "
            "memrt.profiling.fake.fake_tensors()"
        )
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no CUDA device; leave device out")
    return found


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from `seed` and leave the global generators as they were; None: draw from them."""
    if seed is None or is_fake(torch.empty(0)):
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers says nothing below an error and draws no bars inside."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
