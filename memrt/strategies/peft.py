"""Adapters of Hugging Face's PEFT: a frozen model, and small tensors beside its layers that train.

Any method of PEFT that is put into a model's layers: by a configuration object,
`Peft(config=LoraConfig(...))`, or by name, `peft(method="lora", rank=16, targets="all-linear")`.
Adapters are PEFT's own modules, with its rounding, dropout and initialisation; checkpoints hold
them in PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`), which plain PEFT loads,
and beside it a hash of the base (`memrt_base.json`): resume, `memrt merge` and `memrt export`
refuse another base. LoRA of rank r: y = x Wᵀ + (alpha / r) x Aᵀ Bᵀ. Gradients and AdamW's moments
exist for the adapters alone, 16 · r · (in + out) bytes a layer in fp32 with the adapters instead of
12 · in · out. It costs 6 r (in + out) operations a token and layer and saves the 2 · in · out of
W's gradient. Works over packed weights (`nf4`, `int8`): QLoRA.

What it does not lower: activations. On a bf16 base PEFT keeps an fp32 copy of every adapted layer's
input; see `fused_lora`. Methods without layers in the model (prompt and prefix tuning), and those
in which PEFT's own wrapper takes part (AdaLoRA, see `memrt.adapter_methods`), need
`peft.get_peft_model` and no strategy. Hu et al. 2021 (LoRA), arXiv 2106.09685.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from memrt.adapter_folding import fold_adapters
from memrt.adapter_methods import needs_wrapper
from memrt.adapter_reach import warn_of_the_rest
from memrt.adapters import (
    adapter_layers,
    changed_values,
    check_targets,
    inject,
    plain,
    reads_base_weights,
    remove_adapters,
    task_heads,
)
from memrt.base_record import base_record
from memrt.errors import unknown_name
from memrt.kernels.default_dtype import float32_by_default
from memrt.kernels.quiet import without_hub_warning
from memrt.optimizer_slots import wide_moments
from memrt.packed_weights import packed_layers
from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategy import EVERYTHING, Attachment, Claim, Phase, Rule, Slot, Strategy
from memrt.weight_readers import take_long_way

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["Peft"]

# PEFT's names of one thing differ by method
_OPTION_NAMES = {
    "rank": ("init_r", "r"),  # AdaLoRA has both, and ignores r
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout", "rank_dropout", "dropout", "module_dropout"),
    "targets": ("target_modules",),
}
_NOT_GIVEN = (("rank", None), ("alpha", None), ("dropout", None))


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Peft(Strategy):
    """Settings. None leaves a value to PEFT.

    method: PEFT's name of the method ("lora", "ia3", "loha", "lokr", "oft", "hra", ...).
    rank: of the adapters.
    alpha: the scale on their output is alpha / rank; None is 2 * rank where the method has one.
    dropout: on the adapters' input.
    targets: "all-linear" (every linear layer but the head), or names of modules. A task's head
        (a classifier, its pooler) trains whole and is saved, unless modules_to_save is an option.
    options: further arguments of the method's configuration, by PEFT's names; not those of a
        setting that is given.
    config: a PEFT configuration (an object, or its dict) instead of all these, as it is.
    """

    name: ClassVar[str] = "peft"
    phase: ClassVar[Phase] = Phase.TRAINABLE
    lowers: ClassVar[tuple[Account, ...]] = (Account.GRADIENTS, Account.OPTIMIZER)
    brings_parameters: ClassVar[bool] = True

    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: str | tuple[str, ...] = "all-linear"
    options: Mapping[str, Any] | None = None
    config: Any = None

    def __post_init__(self) -> None:
        if find_spec("peft") is None:
            raise ValueError("PEFT is not installed; run: pip install peft")
        self._check_types()
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.options is not None:
            object.__setattr__(self, "options", plain(dict(self.options)))
        if self.config is not None:
            self._take_config()
        self.build()  # refuses what PEFT refuses

    def _check_types(self) -> None:
        if not isinstance(self.method, str):
            raise ValueError(f"method={self.method!r}: must be a name, such as 'lora'")
        if self.rank is not None:
            _require_rank("rank", self.rank)
        if self.alpha is not None:
            _require_alpha("alpha", self.alpha)
        if self.dropout is not None and not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout={self.dropout!r}: must be a number in [0, 1)")
        if not _is_names(self.targets):
            raise ValueError(
                f"targets={self.targets!r}: must be 'all-linear' or a list of modules' names, such "
                "as ['q_proj', 'v_proj']"
            )
        if isinstance(self.targets, str):
            _require_pattern(self.targets)
        if self.options is not None and not (
            isinstance(self.options, Mapping) and all(isinstance(key, str) for key in self.options)
        ):
            raise ValueError(
                f"options={self.options!r}: must be a dict of arguments of PEFT's configuration, "
                "such as {'use_rslora': True}"
            )

    def _take_config(self) -> None:
        given = [
            option.name
            for option in fields(self)
            if option.name != "config" and getattr(self, option.name) != option.default
        ]
        if given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} and config were given; put everything "
                "into config, or leave config out"
            )
        to_dict = getattr(self.config, "to_dict", None)
        is_object = callable(to_dict) and not isinstance(self.config, type)
        config = to_dict() if is_object else self.config  # type: ignore[misc]
        if not isinstance(config, Mapping):
            raise ValueError(
                f"config={self.config!r}: must be a PEFT configuration, such as "
                "peft.LoraConfig(r=8), or its dict"
            )
        if "peft_type" not in config:
            raise ValueError(
                "config: has no peft_type; give a PEFT configuration, such as LoraConfig"
            )
        cls = _config_class(plain(config["peft_type"]), "peft_type of config")
        _require_options(cls, config)
        object.__setattr__(self, "config", changed_values(config))

    def build(self) -> Any:
        """A new PEFT configuration of these settings."""
        if self.config is not None:
            cls = _config_class(self.config["peft_type"], "peft_type of config")
            return _made(cls, self.config)
        cls = _config_class(self.method, "PEFT method", lower=True)
        options = dict(self.options or {})
        _require_options(cls, options)
        return _made(cls, {**self._values(cls, options), **options})

    def build_for(self, model: nn.Module) -> Any:
        """The same for a model: what a task put behind its body trains whole, unless settings say.

        A configuration object, `modules_to_save` among the options and a head among the targets
        are left as they are.
        """
        config = self.build()
        said = self.config is not None or "modules_to_save" in (self.options or {})
        if not said and hasattr(config, "modules_to_save"):
            heads = [head for head in task_heads(model) if not _is_target(head, config)]
            config.modules_to_save = heads or None
        return config

    def changes(self, model: nn.Module, name: str) -> bool:
        """Whether a module of a model gets adapters, or a copy that trains in its place."""
        config = self.build_for(model)
        copied = getattr(config, "modules_to_save", None) or ()
        return _is_target(name, config) or any(name.endswith(part) for part in copied)

    def _values(self, cls: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings by PEFT's names; an option stands in for one that is not given."""
        known = {option.name: option.default for option in fields(cls)}
        names = {
            option: next((name for name in _OPTION_NAMES[option] if name in known), None)
            for option in _OPTION_NAMES
        }
        values: dict[str, Any] = {}
        for option, default in (*_NOT_GIVEN, ("targets", "all-linear")):
            value, name = getattr(self, option), names[option]
            given = value != default
            if given and name is None and option != "targets":
                raise ValueError(f"{option}={value!r}: PEFT's {self.method} has none; leave it out")
            if given and name is not None and name in options:
                raise ValueError(
                    f"{option}={value!r} and options={{{name!r}: {options[name]!r}}} say the same "
                    "thing; leave one of them out"
                )
            if name is not None and value is not None:
                values[name] = list(value) if isinstance(value, tuple) else value
        rank, alpha = names["rank"], names["alpha"]
        if alpha is not None and alpha in options:
            _require_alpha(f"options: {alpha}", options[alpha])
        elif alpha is not None and rank is not None and alpha not in values:
            found = {rank: known[rank], **values, **options}[rank]
            if found is not None:
                _require_rank(f"options: {rank}", found)
                values[alpha] = 2 * found
        return values

    def check(self, facts: Facts) -> None:
        """Needs a method that lives in layers, layers for it, and no adapters yet."""
        config = self.build_for(facts.model)
        kind = config.peft_type.value
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"{kind} puts nothing into the model's layers; wrap the model by "
                "peft.get_peft_model(model, config) and train that, without this strategy"
            )
        wrapped = needs_wrapper(config)
        if wrapped:
            raise ValueError(
                f"{wrapped}, which this strategy does not; train "
                "peft.get_peft_model(model, config) as PEFT's docs say, without this strategy, or "
                "use method='lora'"
            )
        if adapter_layers(facts.model):
            raise ValueError(
                "the model has adapters already; train it without this strategy, or load it anew"
            )
        packed = packed_layers(facts.model)
        if packed:
            self._check_packed(packed[0][1].packed_format.name)
        _require_biases_once(config, facts.model)
        check_targets(config, facts.model)

    def check_stack(self, others: Sequence[Strategy], facts: Facts) -> None:
        """Over packed weights, a method that does not read the weights themselves."""
        for other in others:
            if any(claim.slot is Slot.WEIGHT_FORMAT for claim in other.claims(facts)):
                self._check_packed(other.name)

    def _check_packed(self, form: str) -> None:
        reason = reads_base_weights(self.build())
        if reason:
            raise ValueError(
                f"{reason} reads or changes the weights of the layers, and {form} keeps them "
                "packed; use method='lora' with its usual initialisation"
            )

    def claims(self, facts: Facts) -> list[Claim]:
        """What trains."""
        return [Claim(slot=Slot.ACTIVE_SET, scope=EVERYTHING)]

    def attach(self, run: Session) -> Attachment:
        """Put the adapters into the layers, and freeze everything else."""
        return _Adapters(self, run)


def _require_biases_once(config: Any, model: nn.Module) -> None:
    """What trains whole has its biases saved with it, and transformers saves no tensor twice."""
    if getattr(config, "bias", "none") != "all":
        return
    heads = getattr(config, "modules_to_save", None) or ()
    for name, _ in model.named_parameters():
        module, _, part = name.rpartition(".")
        inside = next((head for head in heads if f".{head}." in f".{module}."), None)
        if part == "bias" and inside is not None:
            raise ValueError(
                f"bias='all' saves {name}, and modules_to_save saves it with {inside!r}: "
                "transformers saves a tensor under one name; use bias='lora_only'"
            )


def _config_class(kind: Any, what: str, *, lower: bool = False) -> Any:
    """PEFT's class for a kind of adapters."""
    with without_hub_warning(), float32_by_default():  # PEFT imports bitsandbytes
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {
        known.value.lower() if lower else known.value: cls
        for known, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if not isinstance(kind, str) or kind not in kinds:
        raise unknown_name(what, str(kind), kinds)
    return kinds[kind]


def _is_target(name: str, config: Any) -> bool:
    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, str):
        return targets.lower() != "all-linear" and re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _require_options(cls: Any, options: Mapping[str, Any]) -> None:
    known = {option.name for option in fields(cls)} | {"peft_type"}
    for option in options:
        if option not in known:
            raise unknown_name(f"option of PEFT's {cls.__name__}", str(option), sorted(known))


def _made(cls: Any, values: Mapping[str, Any]) -> Any:
    try:
        return cls(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"PEFT's {cls.__name__} refuses these settings: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_names(value: object) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(isinstance(name, str) for name in value)
    return isinstance(value, str)


def _require_pattern(targets: str) -> None:
    try:
        re.compile(targets)
    except re.error as error:
        raise ValueError(
            f"targets={targets!r}: is no regular expression ({error}); give a list of names"
        ) from error


def _require_rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more")


def _require_alpha(name: str, value: Any) -> None:
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(
            f"{name}={value!r}: must be a number above 0, or the adapters could not train; leave "
            "it out for 2 * rank"
        )


class _Adapters(Attachment):
    settings: Peft

    def __init__(self, settings: Peft, run: Session) -> None:
        super().__init__(settings, run)
        self._undo = inject(settings.build_for(run.model), run.model)
        take_long_way(run, [name for name, _ in adapter_layers(run.model)])
        if settings.config is None and settings.targets == "all-linear":
            own = run.facts.structure.head, *task_heads(run.model)
            warn_of_the_rest(run.model, apart=[name for name in own if name is not None])

    def rules(self) -> list[Rule]:
        """fp32 moments where a head of bf16 or fp16 trains beside the adapters."""
        return wide_moments(self.run)

    @property
    def apart(self) -> Literal["no", "may", "must"]:
        """Adapters have a folder of their own, in PEFT's layout, where transformers writes it."""
        return "may" if hasattr(self.run.model, "save_pretrained") else "no"

    def save_apart(self, folder: Path) -> None:
        """The adapters, as plain PEFT and transformers load them, and what tells their base."""
        self.run.model.save_pretrained(folder)  # type: ignore[operator]
        base_record(self.run.model).write(folder)

    def export(self, model: nn.Module) -> None:
        """Add what the adapters learned to the weights, dense ones if they were packed."""
        fold_adapters(model)

    def detach(self) -> None:
        """Take the adapters out."""
        remove_adapters(self.run.model, self._undo)
