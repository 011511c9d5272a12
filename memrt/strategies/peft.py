"""Adapters of Hugging Face's PEFT: a frozen model, and small tensors beside its layers that train.

Any method of PEFT that is put into a model's layers: by a configuration object, `Peft(config=
LoraConfig(...))`, or by name, `peft(method="lora", rank=16, targets="all-linear")`. Adapters are
PEFT's own modules, with its rounding, dropout and initialisation; checkpoints hold them in PEFT's
layout (`adapter_config.json`, `adapter_model.safetensors`), which plain PEFT loads, and beside it a
hash of the base (`memrt_base.json`): resume, `memrt merge` and `memrt export` refuse another base.
Gradients and AdamW's moments exist for the adapters alone: for LoRA of rank r, 16 · r · (in + out)
bytes a layer in fp32 instead of 12 · in · out. Works over packed weights (`nf4`, `int8`): QLoRA.

What it does not lower: activations. On a bf16 base PEFT keeps an fp32 copy of every adapted layer's
input; see `fused_lora`. Methods without layers in the model (prompt and prefix tuning) need
`peft.get_peft_model` and no strategy. Hu et al. 2021 (LoRA), arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from memrt.adapters import (
    adapter_layers,
    changed_values,
    check_targets,
    fold_adapters,
    inject,
    plain,
    reads_base_weights,
    remove_adapters,
)
from memrt.base_record import base_record
from memrt.errors import unknown_name
from memrt.kernels.nf4 import without_hub_warning
from memrt.packed_weights import packed_layers
from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategy import EVERYTHING, Attachment, Claim, Phase, Slot, Strategy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["Peft"]

# PEFT's names of one thing differ by method
_OPTION_NAMES = {
    "rank": ("r", "rank", "init_r"),
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout", "rank_dropout", "dropout", "module_dropout"),
    "targets": ("target_modules",),
}


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Peft(Strategy):
    """Settings. None leaves a value to PEFT.

    method: PEFT's name of the method ("lora", "ia3", "adalora", "loha", "lokr", "vera", ...).
    rank: of the adapters.
    alpha: the scale on their output is alpha / rank; 2 * rank where the method has one.
    dropout: on the adapters' input.
    targets: "all-linear" (every linear layer but the head), or names of modules.
    options: further arguments of the method's configuration, by PEFT's names.
    config: a PEFT configuration (an object, or its dict) instead of all these.
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
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.options is not None:
            object.__setattr__(self, "options", plain(dict(self.options)))
        if self.config is not None:
            self._take_config()
        elif self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank={self.rank!r}: must be a whole number, 1 or more")
        elif self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: must lie in [0, 1)")
        self.build()  # refuses what PEFT refuses

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
        config = self.config if isinstance(self.config, Mapping) else self.config.to_dict()
        if "peft_type" not in config:
            raise ValueError(
                "config: has no peft_type; give a PEFT configuration, such as LoraConfig"
            )
        object.__setattr__(self, "config", changed_values(config))

    def build(self) -> Any:
        """A new PEFT configuration of these settings."""
        with without_hub_warning():  # PEFT imports bitsandbytes
            import peft
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        if self.config is not None:
            return peft.get_peft_config(dict(self.config))
        kinds = {kind.value.lower(): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
        if self.method not in kinds:
            raise unknown_name("PEFT method", self.method, sorted(kinds))
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[kinds[self.method]]
        known = {option.name for option in fields(cls)}
        values = self._values(known)
        options = self.options or {}
        for option in options:
            if option not in known:
                raise unknown_name(f"option of PEFT's {cls.__name__}", option, sorted(known))
        try:
            return cls(**{**values, **options})
        except (TypeError, ValueError) as error:
            raise ValueError(f"PEFT's {cls.__name__} refuses these settings: {error}") from error

    def _values(self, known: set[str]) -> dict[str, Any]:
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        wanted = {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "targets": targets,
        }
        values = {}
        for option, value in wanted.items():
            name = next((name for name in _OPTION_NAMES[option] if name in known), None)
            if name is not None and value is not None:
                values[name] = value
            elif name is not None and option == "alpha" and self.rank is not None:
                values[name] = 2 * self.rank
            elif value is not None and option != "targets":
                raise ValueError(f"{option}={value!r}: PEFT's {self.method} has none; leave it out")
        return values

    def check(self, facts: Facts) -> None:
        """Needs a method that lives in layers, layers for it, and no adapters yet."""
        config = self.build()
        kind = config.peft_type.value
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"{kind} puts nothing into the model's layers; wrap the model by "
                "peft.get_peft_model(model, config) and train that, without this strategy"
            )
        if adapter_layers(facts.model):
            raise ValueError(
                "the model has adapters already; train it without this strategy, or load it anew"
            )
        packed = packed_layers(facts.model)
        if packed:
            self._check_packed(packed[0][1].packed_format.name)
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


class _Adapters(Attachment):
    settings: Peft

    def __init__(self, settings: Peft, run: Session) -> None:
        super().__init__(settings, run)
        self._undo = inject(settings.build(), run.model)

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
