"""`memrt.plan`: what a run will need, from the run itself on fake tensors.

No weights, no GPU, no formula to keep in step: the model is built on fake tensors, the strategies
attach, and the session trains two optimizer steps (state appears in the first, the second is the
steady state) under the ledger. Repeated layers are simulated at three small depths and
extrapolated: the peak of every segment of a step (first, second, last but one and last layer;
everything outside the layers; each phase; each step) is affine in the depth, which the third depth
must confirm, else every layer is run; and so it is where micro-batches are not alike.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrt import registry
from memrt.gpus import Gpu, Host
from memrt.model_source import CLASSIFICATION, for_task, task_of
from memrt.profiling.extrapolate import Simulation, extrapolate, segment
from memrt.profiling.fake import (
    Routing,
    fake_floats,
    fake_initialisers,
    fake_tensors,
    real_integers,
    real_tensors,
)
from memrt.profiling.flops import FlopCounter
from memrt.profiling.ledger import Ledger
from memrt.profiling.outside import EVALUATE, Outside
from memrt.profiling.report import SCHEMA, conditions
from memrt.random_batches import Shape, batches_of, random_batches
from memrt.runner import Batch, alike, copied, evaluate, model_loss, start, train_step
from memrt.structure import Facts, RunSettings, discover

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from memrt.strategy import Strategy

__all__ = ["Plan", "Shape", "batches_of", "facts_of", "plan", "random_batches", "simulate"]

DEPTHS = (4, 5, 6)
"""Depths that are simulated; at four, first, second, last but one and last layer are distinct."""

STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A predicted run. Bytes are what the ledger of the real run would count."""

    simulation: Simulation
    num_layers: int
    simulated_layers: tuple[int, ...]
    """Depths that were run; one entry when every layer was."""
    shape: Shape
    strategies: tuple[str, ...]
    gpu: Gpu | None = None
    host: Host | None = None
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    worst: Simulation | None = None
    """The run with the most uneven routing; None for a model without a router."""

    @property
    def peak_bytes(self) -> int:
        """Highest live bytes on the device."""
        return self.simulation.peak.peak_bytes

    @property
    def device_bytes(self) -> dict[str, int]:
        """What nvidia-smi would show at the peak: low, expected and high.

        Loading, evaluation and resuming count where one of them goes higher than the steps do.
        """
        highest = max((each["device"] for each in self.outside.values()), default=0)
        return Gpu.required_bytes(
            self.simulation.rounded_peak_bytes, self.worst_rounded_peak_bytes, highest
        )

    @property
    def outside(self) -> dict[str, dict[str, int]]:
        """Peaks on device and host of `load`, `evaluate` (a training batch), `save`, `resume`."""
        from memrt.checkpoint import MAX_SHARD_BYTES

        found = self.simulation.outside
        return {} if found is None else found.phases(largest_file_bytes=MAX_SHARD_BYTES)

    @property
    def worst_rounded_peak_bytes(self) -> int | None:
        """The rounded peak of the worst routing; None for a model without a router."""
        return None if self.worst is None else self.worst.rounded_peak_bytes

    @property
    def host_bytes(self) -> dict[str, int]:
        """Host memory that tensors take at its peak: counted, and in pinned blocks.

        On CUDA all of it is pinned, in blocks of powers of two. Python, its libraries and the data
        are not in it.
        """
        runs = [self.simulation] if self.worst is None else [self.simulation, self.worst]
        return {
            "counted": max(run.place_peaks["host"] for run in runs),
            "pinned": max(run.pinned_peak_bytes for run in runs),
        }

    @property
    def disk_bytes(self) -> int:
        """Temporary files at their peak."""
        return self.simulation.place_peaks["disk"]

    @property
    def flops(self) -> int:
        """FLOPs of an optimizer step in the steady state."""
        return sum(self.simulation.of_step(self.simulation.flops).values())

    @property
    def transfer_bytes(self) -> int:
        """Bytes that an optimizer step moves between device, host and disk."""
        return sum(self.simulation.of_step(self.simulation.moved).values())

    @property
    def fits_host(self) -> bool | None:
        """Whether the pinned blocks fit the host; None when no size was named."""
        return None if self.host is None else self.host_bytes["pinned"] <= self.host.total_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the high bound fits the GPU, and the host its part; None: neither was named."""
        on_device = None if self.gpu is None else self.device_bytes["high"] <= self.gpu.total_bytes
        known = [fits for fits in (on_device, self.fits_host) if fits is not None]
        return all(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """The report schema, with nothing measured in it."""
        return {
            "schema": SCHEMA,
            "kind": "plan",
            **self.simulation.to_json(),
            **self.simulation.work_json(),
            "tokens_per_second": None,
            "loss": None,
            "device_bytes": self.device_bytes,
            "worst_rounded_peak_bytes": self.worst_rounded_peak_bytes,
            "outside": self.outside,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "gpu": None if self.gpu is None else self.gpu.to_json(),
            "host": None if self.host is None else self.host.to_json(),
            "fits_host": self.fits_host,
            "fits": self.fits,
            "num_layers": self.num_layers,
            "simulated_layers": list(self.simulated_layers),
            "seconds": self.seconds,
            "conditions": conditions(
                settings=self.settings, strategies=self.strategies, device="cpu"
            ),
        }


def simulate(
    build: Callable[[], nn.Module],
    strategies: Sequence[Strategy],
    window: Sequence[Batch],
    *,
    settings: RunSettings,
    loss_of: Callable[[nn.Module, Batch], Tensor] = model_loss,
    steps: int = STEPS,
    routing: Routing = "balanced",
) -> Simulation:
    """Train `steps` optimizer steps on fake tensors and return what the ledger counted.

    `routing` says which experts a router picks, if the model has one.
    """
    with ExitStack() as stack:
        mode = stack.enter_context(fake_tensors())
        ledger = Ledger()
        # one to look at, one a step, one to evaluate: what is kept of one ends with its step
        windows = _batches_of_steps(mode, window, steps + 2)
        loading = Ledger()
        with fake_initialisers(), loading:
            model = build()
        integers = stack.enter_context(real_integers(routing))
        stack.enter_context(ledger)
        counter = FlopCounter(ledger.now)
        ledger.on_operator = counter.see
        with fake_initialisers():  # a strategy may build layers of its own
            run = start(
                model,
                strategies,
                settings=settings,
                ledger=ledger,
                loss_of=loss_of,
                probe=windows.pop()[0],
            )
        while len(windows) > 1:
            train_step(run, windows.pop(), read_values=False)
        structure = run.session.facts.structure
        key = segment(structure.layer_of, structure.layer_names)
        trained = Simulation.of(
            ledger.timeline,
            key,
            routed=integers.routed,
            flops=dict(counter.flops),
            moved=dict(ledger.moved),
            uncounted=frozenset(counter.uncounted),
        )
        steps_end = ledger.timeline.now
        with ledger.phase(EVALUATE):
            evaluate(run, windows.pop()[0])
        ledger.close()
    outside = Outside.of(ledger.timeline, loading=loading.timeline, steps_end=steps_end)
    return replace(trained, outside=outside)


def _batches_of_steps(
    mode: FakeTensorMode, window: Sequence[Batch], num_steps: int
) -> list[list[Batch]]:
    """A window for every step: what autograd keeps of a batch goes with it."""
    with real_tensors():
        copies = [copied(window) for _ in range(num_steps)]
    return [
        [{name: fake_floats(mode, value) for name, value in batch.items()} for batch in each]
        for each in copies
    ]


def _with_depth(config: Any, depth: int) -> Any:
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = depth
    for name, value in vars(config).items():  # one entry a layer, such as `layer_types`
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers:
            setattr(shallow, name, list(value)[:depth])
    return shallow


def _extrapolates(config: Any, strategies: Sequence[Strategy], build: Any) -> bool:
    """Whether layers are alike, and enough of them to be worth it."""
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth <= max(DEPTHS):
        return False
    if len(set(getattr(config, "layer_types", None) or [""])) > 1:
        return False
    if not all(strategy.uniform_layers for strategy in strategies):
        return False
    with fake_tensors():
        structure = discover(build(_with_depth(config, 2)))
    return len(structure.stacks) == 1 and len(structure.layer_names) == 2


def plan(
    model: Any,
    strategies: Sequence[str | Strategy] = (),
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    accumulation_steps: int = 1,
    dtype: torch.dtype = torch.float32,
    max_grad_norm: float = 1.0,
    gpu: str | None = None,
    host: str | None = None,
    full: bool = False,
    window: Sequence[Batch] | None = None,
    loss_of: Callable[[nn.Module, Batch], Tensor] = model_loss,
    task: str | None = None,
) -> Plan:
    """Predict the memory of training `model`, to the byte of the ledger of the same run.

    `model` is a config object, a folder or file with `config.json`, a hub id, or a function without
    arguments that builds an `nn.Module` (then `window`, the micro-batches of one step, is needed).
    `gpu` (a card or a size) and `host` (a size) are what it is to fit. `task` is that of
    `memrt.load`, such as "sequence-classification"; None is what the config names.
    """
    shape = Shape(
        batch_size=batch_size,
        sequence_length=sequence_length,
        accumulation_steps=accumulation_steps if window is None else len(window),
    )
    card = None if gpu is None else Gpu.parse(gpu)
    memory = None if host is None else Host.parse(host)
    parsed = registry.parse_all(strategies)
    settings = RunSettings(max_grad_norm=max_grad_norm, accumulation_steps=shape.accumulation_steps)
    began = time.perf_counter()
    source = _source(model, task, batch_size=shape.batch_size if window is None else None)
    arguments = (source, parsed, shape, dtype, full, window)
    options: dict[str, Any] = {"settings": settings, "loss_of": loss_of}
    simulation, num_layers, depths = _plan_model(*arguments, {**options, "routing": "balanced"})
    worst = None
    if simulation.routed:
        worst, _, _ = _plan_model(*arguments, {**options, "routing": "worst"})
    return Plan(
        simulation=simulation,
        num_layers=num_layers,
        simulated_layers=depths,
        shape=shape,
        strategies=tuple(str(strategy) for strategy in parsed),
        gpu=card,
        host=memory,
        worst=worst,
        seconds=time.perf_counter() - began,
        settings={
            "model": getattr(model, "model_type", str(model)),
            "batch_size": shape.batch_size,
            "sequence_length": shape.sequence_length,
            "accumulation_steps": shape.accumulation_steps,
            "dtype": str(dtype).removeprefix("torch."),
            "optimizer": "AdamW",
            "max_grad_norm": max_grad_norm,
        },
    )


def facts_of(
    model: Any,
    *,
    dtype: torch.dtype = torch.float32,
    settings: RunSettings | None = None,
    task: str | None = None,
) -> Facts:
    """What strategies check of a model, built whole on fake tensors."""
    from memrt.loading import load

    source = _source(model, task)
    with fake_tensors(), fake_initialisers():
        built = source() if _is_builder(source) else load(source, [], dtype=dtype)
    return Facts(model=built, structure=discover(built), settings=settings or RunSettings())


def _is_builder(model: Any) -> bool:
    """Whether a model was given as a function that builds it."""
    return callable(model) and not hasattr(model, "num_hidden_layers")


def _source(model: Any, task: str | None, *, batch_size: int | None = None) -> Any:
    """The config of a model, for its task; a function that builds one as it is.

    Classifiers among decoders look for each text's last token that is none of padding. A batch of
    random ids has no padding, and of several texts they want it named all the same.
    """
    from memrt.loading import resolve_config

    if _is_builder(model):
        if task is not None:
            raise ValueError(f"task={task!r} has no effect on a model given as a function")
        return model
    config = resolve_config(model)
    if task is not None:
        config = for_task(config, task)
    if batch_size is None or batch_size == 1 or not hasattr(config, "vocab_size"):
        return config
    if task_of(config) != CLASSIFICATION or config.get_text_config().pad_token_id is not None:
        return config
    config = copy.deepcopy(config)
    for each in (config, config.get_text_config()):
        each.pad_token_id = 0
    return config


def _plan_model(
    model: Any,
    strategies: Sequence[Strategy],
    shape: Shape,
    dtype: torch.dtype,
    full: bool,
    window: Sequence[Batch] | None,
    options: dict[str, Any],
) -> tuple[Simulation, int, tuple[int, ...]]:
    """The simulation, the number of layers, and the depths that were run."""
    from memrt.loading import load

    if _is_builder(model):
        if window is None:
            raise ValueError("window=None: a model given as a function needs its micro-batches")
        return simulate(model, strategies, window, **options), 0, ()
    config = model

    def build(some_config: Any) -> nn.Module:
        return load(some_config, strategies, dtype=dtype)

    with real_tensors():
        batches = window or batches_of(config, shape)

    def at_depth(depth: int) -> Simulation:
        return simulate(lambda: build(_with_depth(config, depth)), strategies, batches, **options)

    depth = int(getattr(config, "num_hidden_layers", 0))
    if not full and alike(batches) and _extrapolates(config, strategies, build):
        found = extrapolate({d: at_depth(d) for d in DEPTHS}, depth)
        if found is not None:
            return found, depth, DEPTHS
    whole = simulate(lambda: build(config), strategies, batches, **options)
    return whole, depth, (depth,)
