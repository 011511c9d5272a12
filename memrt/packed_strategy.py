"""The strategies that keep frozen weights packed (`nf4`, `int8`): settings, loading, runtime.

A subclass names its format. While a model loads, each weight is packed before the next one is read,
and the whole model is frozen. Attached to a loaded model they pack in place, layer by layer, and
freeze the model, unless the weights to pack are frozen already: then the user has chosen what
trains. Packing rounds, so `detach` gives back classes, shapes and dtypes, but rounded values.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from memrt.packed_weights import (
    PackedFormat,
    is_packed,
    note_packed,
    pack,
    packable,
    packable_weights,
    packed_layers,
    unpack,
)
from memrt.profiling.accounts import Account
from memrt.strategy import Attachment, Claim, Loading, Phase, Slot, Strategy
from memrt.weight_readers import reader_of, take_long_way

if TYPE_CHECKING:
    import torch

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["PackedStrategy"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStrategy(Strategy):
    """Settings.

    head: pack the language-model head too, unless it is tied to the embeddings.
    keep: names of modules (a part between two dots) that stay as they are.
    """

    phase: ClassVar[Phase] = Phase.PRECISION
    lowers: ClassVar[tuple[Account, ...]] = (Account.WEIGHTS,)
    packed_format: ClassVar[PackedFormat]

    head: bool = False
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.head, bool):
            raise ValueError(f"head={self.head!r}: must be True or False")
        if not isinstance(self.keep, (list, tuple)) or any(
            not isinstance(part, str) for part in self.keep
        ):
            raise ValueError(f"keep={self.keep!r}: must be a list such as ['o_proj']")
        object.__setattr__(self, "keep", tuple(self.keep))

    def targets(self, facts: Facts) -> list[str]:
        """Names of the layers that are still to be packed."""
        return packable(facts, head=self.head, keep=self.keep)

    def _packed(self, facts: Facts) -> list[str]:
        return [name for name, _ in packed_layers(facts.model)]

    def check(self, facts: Facts) -> None:
        """Needs linear layers in the repeated layers, dense or in this format already."""
        kind = type(facts.model).__name__
        for name, module in packed_layers(facts.model):
            if module.packed_format is not self.packed_format:
                raise ValueError(
                    f"{name} is in the format {module.packed_format.name} already; "
                    f"load the model with {self.name} alone"
                )
        for part in self.keep:
            if not any(part in name.split(".") for name, _ in facts.model.named_modules()):
                raise ValueError(f"keep={list(self.keep)!r}: {kind} has no module named {part!r}")
        if self.head and not self._head_can_be_packed(facts):
            head = facts.structure.head
            reader = None if head is None else reader_of(facts.model, head)
            if reader is not None:
                raise ValueError(
                    f"head=True: {type(reader).__name__} reads {head}.weight itself, which must "
                    "stay as it is for that; leave head out"
                )
            raise ValueError(
                f"head=True: {kind} has no linear head with a weight of its own; leave head out"
            )
        if not self.targets(facts) and not self._packed(facts):
            raise ValueError(
                f"{kind} has no linear layer in a list of repeated layers, so that there is "
                f"nothing to keep in {self.name}; use another strategy"
            )

    def _head_can_be_packed(self, facts: Facts) -> bool:
        head = facts.structure.head
        return head is not None and (
            head in self.targets(facts) or is_packed(facts.model.get_submodule(head))
        )

    def check_stack(self, others: Sequence[Strategy], facts: Facts) -> None:
        """Needs something that trains, for the model itself is frozen, and one rule of what is."""
        self._check_choice(others, facts)
        remain = not self._freezes(facts) and any(True for _ in facts.parameters())
        if not remain and not any(other.brings_parameters for other in others):
            raise ValueError(
                f"every weight of the model is frozen under {self.name}, so that nothing is left "
                'to train; add adapters, "peft(method=\'lora\')", or a side network, "ladder"'
            )

    def _check_choice(self, others: Sequence[Strategy], facts: Facts) -> None:
        """Beside what freezes the model anyway, frozen weights do not say what is to be packed."""
        brought = next((other.name for other in others if other.brings_parameters), None)
        weights = packable_weights(facts, head=self.head, keep=self.keep)
        trains = [name for name, weight in weights.items() if weight.requires_grad]
        if brought is not None and 0 < len(trains) < len(weights):
            raise ValueError(
                f"{len(weights) - len(trains)} of the {len(weights)} weights that {self.name} "
                f"packs are frozen and the others ({trains[0]}, say) train, but {brought} freezes "
                "all of them; freeze all or none, and name what is to stay as it is: "
                f"{self.name}(keep=[...])"
            )

    def _freezes(self, facts: Facts) -> bool:
        weights = [facts.model.get_submodule(name).weight for name in self.targets(facts)]
        return any(isinstance(w, Tensor) and w.requires_grad for w in weights)

    def claims(self, facts: Facts) -> list[Claim]:
        """The format of the packed weights."""
        names = [*self.targets(facts), *self._packed(facts)]
        scope = frozenset(f"{name}.weight" for name in names)
        return [Claim(slot=Slot.WEIGHT_FORMAT, scope=scope)]

    def loading(self, facts: Facts) -> Loading:
        """Pack each weight as it comes."""
        self.check(facts)
        _warn_of_the_rest(self, facts)
        return _PackedLoading(self, facts)

    def attach(self, run: Session) -> Attachment:
        """Pack what is not packed yet, and recast those layers."""
        return _Packed(self, run)


def _warn_of_the_rest(settings: PackedStrategy, facts: Facts) -> None:
    """Fused experts are no linear layers: say so when most of the layers' weights stay."""
    names = {f"{name}.weight" for name in (*settings.targets(facts), *settings._packed(facts))}
    inside = {n: p for n, p in facts.model.named_parameters() if facts.structure.layer_of(n)}
    rest = {name: p.numel() for name, p in inside.items() if name not in names}
    packed = [module.dense_shape for _, module in packed_layers(facts.model)]
    dense = sum(p.numel() for name, p in inside.items() if name in names and p.is_floating_point())
    total = dense + sum(rows * columns for rows, columns in packed)
    if sum(rest.values()) > total:
        logger.warning(
            "%s: %d of the layers' %d weights are not in linear layers that can be packed (such "
            "as %s) and stay as they are",
            settings.name,
            sum(rest.values()),
            total + sum(rest.values()),
            max(rest, key=rest.__getitem__),
        )


class _PackedLoading(Loading):
    settings: PackedStrategy

    def __init__(self, settings: PackedStrategy, facts: Facts) -> None:
        super().__init__(settings)
        self._model = facts.model
        self._targets = set(settings.targets(facts))
        self._dense: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def place_weight(self, name: str, tensor: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer not in self._targets or layer == name:
            return tensor
        self._dense[layer] = tuple(tensor.shape), tensor.dtype
        module = self._model.get_submodule(layer)
        return self.settings.packed_format.pack(tensor, _output_axis(module))

    def finish(self) -> None:
        for layer, (shape, dtype) in self._dense.items():
            module = self._model.get_submodule(layer)
            kind = note_packed(self.settings.packed_format, module, shape, dtype)
            module.__class__ = kind
        self._model.requires_grad_(False)


class _Packed(Attachment):
    settings: PackedStrategy

    def __init__(self, settings: PackedStrategy, run: Session) -> None:
        super().__init__(settings, run)
        freezes = settings._freezes(run.facts)
        if not settings._packed(run.facts):
            _warn_of_the_rest(settings, run.facts)
        self._here: list[nn.Module] = []
        try:
            for name in settings.targets(run.facts):
                module = run.model.get_submodule(name)
                run.recast(name, pack(settings.packed_format, module))
                self._here.append(module)
            take_long_way(run, settings._packed(run.facts))
        except BaseException:
            self.detach()
            raise
        if freezes:
            run.model.requires_grad_(False)

    def tensors(self) -> list[tuple[Tensor, Account]]:
        """The packed weights."""
        layers = packed_layers(self.run.model)
        return [(module.weight, Account.WEIGHTS) for _, module in layers]

    def state_dict(self) -> dict[str, Any]:
        """The format: the packed weights are the model's own tensors."""
        return {"format": self.settings.packed_format.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses another format."""
        if state.get("format") != self.settings.packed_format.name:
            raise ValueError(
                f"the checkpoint holds weights in the format {state.get('format')!r}, this run "
                f"keeps them in {self.settings.packed_format.name!r}; resume with the same strategy"
            )

    def export(self, model: nn.Module) -> None:
        """Dense weights, layer by layer; they train again."""
        for _, module in packed_layers(model):
            unpack(module)
            module.weight.requires_grad_(True)
        self._here = []

    def detach(self) -> None:
        """Dense weights for the layers that were dense before."""
        for module in self._here:
            if is_packed(module):
                unpack(module)
        self._here = []


def _output_axis(module: nn.Module) -> int:
    return 0 if isinstance(module, nn.Linear) else 1
