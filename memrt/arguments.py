"""`TrainingArguments`: transformers' arguments plus which memory strategies a run uses.

They go through `HfArgumentParser`: on the command line `--strategies "lisa(layers=2)" int8_states`,
in YAML a list of strings or of mappings (`- lisa: {layers: 2}`). An `optim` that means a strategy
(`galore_adamw` with its `optim_args`) becomes it (`memrt.translation`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import transformers

from memrt import registry
from memrt.gpus import check_budget
from memrt.refused_optimizers import require_served
from memrt.strategy import Phase
from memrt.structure import RunSettings
from memrt.translation import TORCH_ADAMW, from_optim, join, tell_optim
from memrt.values import is_number

if TYPE_CHECKING:
    from memrt.strategy import Strategy

__all__ = ["RANGES", "TrainingArguments", "settings_of"]

_TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
_AT_LEAST_1 = "must be at least 1"
_SHARE = "must be a number from 0 and below 1"

RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "per_device_train_batch_size": (lambda size: size >= 1, _AT_LEAST_1),
    "per_device_eval_batch_size": (lambda size: size >= 1, _AT_LEAST_1),
    "gradient_accumulation_steps": (lambda steps: steps >= 1, _AT_LEAST_1),
    "learning_rate": (lambda rate: 0 <= rate < math.inf, "must be a number from 0"),
    "weight_decay": (lambda decay: 0 <= decay < math.inf, "must be a number from 0"),
    "adam_beta1": (lambda beta: 0 <= beta < 1, _SHARE),
    "adam_beta2": (lambda beta: 0 <= beta < 1, _SHARE),
    "seed": (
        lambda seed: isinstance(seed, int) and 0 <= seed < 2**32,
        "must be a whole number from 0 to 4294967295",
    ),
    "adam_epsilon": (lambda epsilon: 0 <= epsilon < math.inf, "must be a number from 0"),
}
"""Numbers that transformers takes as they are, or refuses late and by another name."""


def _decoded(spec: Any) -> Any:
    """A strategy as JSON text (`'{"name": "lisa", "layers": 2}'`) becomes a mapping."""
    if not isinstance(spec, str) or not spec.lstrip().startswith("{"):
        return spec
    try:
        return json.loads(spec)
    except json.JSONDecodeError as error:
        raise ValueError(f"strategies: {spec!r} is not JSON ({error}); mind the quotes") from None


@dataclass
class TrainingArguments(transformers.TrainingArguments):  # type: ignore[misc]
    """The fields of `transformers.TrainingArguments`, and five of memrt's."""

    # transformers' parser resolves the annotation and reads `list[str]` as one or more strings;
    # mappings and Strategy objects are accepted as well and come out as strings
    strategies: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Memory strategies as name or name(option=value, ...), for example "
            '"lisa(layers=2, every=20)", or as JSON with "name" and options.'
        },
    )
    memory_report: bool = field(
        default=False,
        metadata={
            "help": "Count every storage of the first 3 optimizer steps, which run slower, watch "
            "the rest (allocator, NVML, RSS), and write <output_dir>/memrt/report.md, .json and "
            ".html."
        },
    )
    stop_on_nonfinite: bool = field(
        default=True,
        metadata={"help": "Stop with an error when the loss becomes NaN or infinite."},
    )
    stochastic_rounding: bool = field(
        default=True,
        metadata={
            "help": "Round bf16 weights stochastically, where a strategy brings a part of the "
            "optimizer: updates below bf16's precision then count in the mean."
        },
    )

    memory_budget: str | None = field(
        default=None,
        metadata={
            "help": "Add the strategies that change training least and fit this card or size, "
            "such as 24GiB; those of `strategies` stay."
        },
    )

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            check_budget(self.memory_budget)
        specs = [] if self.strategies is None else self.strategies
        if isinstance(specs, str):
            raise ValueError(f"strategies={specs!r}: must be a list; write [{specs!r}]")
        if not isinstance(specs, (list, tuple)):
            raise ValueError(
                f"strategies={specs!r}: must be a list, such as ['lisa', 'int8_states']"
            )
        self._check_ranges()
        for name in ("memory_report", "stop_on_nonfinite", "stochastic_rounding"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        parsed = registry.parse_all([_decoded(spec) for spec in specs])
        parsed = self._with_optim(parsed)
        stepping = [s for s in parsed if s.phase in (Phase.TRAINABLE, Phase.UPDATE)]
        if not self.stochastic_rounding and not stepping:
            raise ValueError(
                "stochastic_rounding=False has no effect without strategies that bring a part of "
                "the optimizer: torch's AdamW rounds to the nearest; leave it out"
            )
        # strings, so that the arguments go to JSON, to a logger and through dataclasses.replace
        self.strategies = [str(strategy) for strategy in parsed]
        super().__post_init__()

    def _check_ranges(self) -> None:
        for name, (holds, rule) in RANGES.items():
            value = getattr(self, name)
            if not is_number(value) or not holds(value):
                raise ValueError(f"{name}={value!r}: {rule}")

    def _with_optim(self, listed: list[Strategy]) -> list[Strategy]:
        """The strategies that `optim` names too, such as galore_adamw; it is torch's AdamW then."""
        own: Any = self  # mypy does not see the fields of transformers
        require_served(own.optim)
        found = from_optim(
            own.optim,
            own.optim_args,
            own.optim_target_modules,
            max_grad_norm=own.max_grad_norm,
        )
        if not found:
            return listed
        name = str(getattr(own.optim, "value", own.optim))
        joined = registry.parse_all(join(listed, found, subject=f"optim={name!r}"))
        tell_optim(name, found)
        own.optim, own.optim_args, own.optim_target_modules = TORCH_ADAMW, None, None
        return joined


def settings_of(arguments: Any) -> RunSettings:
    """What arguments, transformers' own too, tell strategies of a run in one process."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    return RunSettings(
        learning_rate=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        epsilon=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm or 0.0,
        accumulation_steps=arguments.gradient_accumulation_steps,
        optimizer="adamw" if name in _TORCH_ADAMW else name,
        fp16=arguments.fp16,
        data_parallel=arguments.n_gpu > 1,
        # the name changed within transformers 5
        gradient_checkpointing=bool(getattr(arguments, "activation_checkpointing", False))
        or bool(getattr(arguments, "gradient_checkpointing", False)),
        label_smoothing=arguments.label_smoothing_factor,
        liger_kernels=arguments.use_liger_kernel,
        seed=arguments.seed,
        stochastic_rounding=getattr(arguments, "stochastic_rounding", True),
    )
