"""The strategy protocol: settings (`Strategy`), runtime (`Attachment`), slots, promises, phases.

A strategy shrinks or moves one or more memory accounts. Its *settings* are a frozen dataclass that
compares, prints and goes to JSON and back; its *runtime* belongs to one model and one run. Every
door of an attachment has a default that does nothing, so that a strategy says only what it does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from memrt.profiling.accounts import Account

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = [
    "EVERYTHING",
    "Attachment",
    "Claim",
    "Loading",
    "Phase",
    "Promise",
    "Rule",
    "Slot",
    "Strategy",
]


class Phase(IntEnum):
    """When a strategy attaches and in which order its doors are called; not the user's order."""

    STRUCTURE = 0
    PRECISION = 1
    PLACEMENT = 2
    TRAINABLE = 3
    UPDATE = 4
    ACTIVATIONS = 5
    HEAD = 6


class Slot(str, Enum):
    """What a strategy may own, for named parameters or modules. One owner per slot and name."""

    UPDATE_RULE = "update rule"
    STATE_FORMAT = "state format"
    PROJECTION = "projection"
    UPDATE_TIME = "update time"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"
    SAVED_FORMAT = "saved format"
    SAVED_PLACE = "saved place"
    ACTIVE_SET = "active set"
    WEIGHT_FORMAT = "weight format"
    WEIGHT_PLACE = "weight place"
    HEAD = "head"


class Promise(str, Enum):
    """What ordinary training guarantees and a strategy may need or break."""

    GRADIENTS_OUTLIVE_BACKWARD = "every gradient is there when backward is over"
    PARAMETERS_REST_IN_BACKWARD = "no parameter changes while the step still reads it"
    EVERY_PARAMETER_GETS_A_GRADIENT = "every parameter gets a gradient"
    BACKWARD_SEES_FORWARD = "backward sees the activations that forward computed"
    GRADIENT_IS_FORMED = "a weight's full gradient exists"
    PARAMETERS_STAY_WHOLE = "parameters stay whole tensors"


EVERYTHING: frozenset[str] = frozenset({"*"})
"""The scope of a claim on every parameter and module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A slot taken for a scope: names of parameters or modules, or `EVERYTHING`."""

    slot: Slot
    scope: frozenset[str] = EVERYTHING

    def overlap(self, other: Claim) -> frozenset[str]:
        """The names for which both claims take the same slot (empty: they do not collide)."""
        if self.slot is not other.slot:
            return frozenset()
        if self.scope == EVERYTHING:
            return other.scope
        return self.scope if other.scope == EVERYTHING else self.scope & other.scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A part of the optimizer for the parameters that `match`; the first match of a slot wins.

    `build(name, parameter)` returns what the slot holds: the name of a state format for
    `Slot.STATE_FORMAT`, a projection object for `Slot.PROJECTION`, an optimizer class for
    `Slot.UPDATE_RULE` (made with `options`), "backward" for `Slot.UPDATE_TIME`.
    """

    slot: Slot
    match: Callable[[str, nn.Parameter], bool]
    build: Callable[[str, nn.Parameter], Any]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """Settings of one memory strategy. Subclasses are frozen, slotted, keyword-only dataclasses.

    Values are checked in `__post_init__`, their fit to a model in `check`; both raise `ValueError`
    with argument, value and remedy.
    """

    name: ClassVar[str] = ""
    phase: ClassVar[Phase] = Phase.STRUCTURE
    lowers: ClassVar[tuple[Account, ...]] = ()
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[Promise]] = frozenset()
    breaks: ClassVar[frozenset[Promise]] = frozenset()
    brings_parameters: ClassVar[bool] = False
    """Whether it adds parameters that train beside what the model has (adapters, side networks)."""

    @property
    def uniform_layers(self) -> bool:
        """Whether every repeated layer is treated alike, so that a plan may extrapolate layers."""
        return True

    @property
    def clips(self) -> bool:
        """Whether it clips to `max_grad_norm` itself, and so needs no gradient after backward."""
        return False

    def check(self, facts: Facts) -> None:
        """Refuse a model or a setting with `ValueError`; must not touch anything."""

    def check_stack(self, others: Sequence[Strategy], facts: Facts) -> None:
        """Refuse a stack that lacks a strategy which this one needs, with `ValueError`."""

    def claims(self, facts: Facts) -> list[Claim]:
        """The slots that this strategy takes on this model."""
        return []

    def place_weight(self, name: str, tensor: Tensor) -> Tensor:
        """Hold a weight while a model is loaded: called once for every tensor, before the next."""
        return tensor

    def loading(self, facts: Facts) -> Loading:
        """Its part in loading one model, for a strategy to which the model's structure matters."""
        return Loading(self)

    def leaner(self) -> list[tuple[Strategy, str]]:
        """The same with settings that keep less for backward, and what each of them changes.

        From the least change of training to the largest: what to try where a plan does not fit.
        """
        return []

    def attach(self, run: Session) -> Attachment:
        """Transform the model through `run` and return the runtime."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to attach")

    def to_json(self) -> dict[str, Any]:
        """Name and settings as plain JSON values; `registry.from_json` reads it back."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


class Loading:
    """A strategy's part in loading one model: every weight passes by, then `finish` is called.

    The model that `loading` was given is on meta then, and has its weights at `finish`.
    """

    def __init__(self, settings: Strategy) -> None:
        self.settings = settings
        self.name = settings.name

    def place_weight(self, name: str, tensor: Tensor) -> Tensor:
        """Hold a weight: called once for every tensor, before the next."""
        return self.settings.place_weight(name, tensor)

    def finish(self) -> None:
        """Every weight is in its place."""


class Attachment:
    """The runtime of a strategy on one model and one run. Override the doors that are used."""

    norm_kind: str = "exact"
    """What the session's gradient norm is under this strategy: "exact", or e.g. "projected"."""

    def __init__(self, settings: Strategy, run: Session) -> None:
        self.settings = settings
        self.run = run

    @property
    def name(self) -> str:
        """The strategy's name, which is also the owner of its bytes in the ledger."""
        return self.settings.name

    def rules(self) -> list[Rule]:
        """Parts of the optimizer."""
        return []

    def before_step(self, step: int) -> None:
        """Called before the first micro-batch of optimizer step `step` (0-based)."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer has stepped, in reverse phase order."""

    def pack(self, tensor: Tensor) -> Any:
        """Replace a tensor that autograd saves; return a tensor or a nested tuple of tensors."""
        return tensor

    def unpack(self, packed: Any) -> Tensor:
        """Give back what `pack` replaced."""
        result: Tensor = packed
        return result

    def around_micro_batch(self) -> AbstractContextManager[object]:
        """A context around forward and backward of one micro-batch."""
        return nullcontext()

    def micro_batch(self, forward: Callable[[], Tensor]) -> Tensor:
        """Replace forward and backward (`Slot.BACKWARD`); returns the loss."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Replace backward alone (`Slot.BACKWARD`), in place of `micro_batch`."""
        raise NotImplementedError

    def loss(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Head and loss from the head's input (`Slot.HEAD`)."""
        raise NotImplementedError

    def squared_gradient_norm(self) -> Tensor | None:
        """Squared norm of gradients that are not in `.grad`; None when all are."""
        return None

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply gradients that are not in `.grad` by a 0-dim tensor (clipping)."""

    def clear_gradients(self) -> None:
        """Drop gradients that are not in `.grad`: the step is skipped, or backward runs again."""

    def gradient_norms(self) -> Mapping[nn.Parameter, Tensor]:
        """Norms (0-dim) of this step's gradients that were in `.grad` and have been applied."""
        return {}

    def tensors(self) -> list[tuple[Tensor, Account]]:
        """Live tensors that the ledger should book to an account of this strategy's."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts only (safe `weights_only` load)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            raise ValueError(
                f"the checkpoint holds state {sorted(state)} for strategy {self.name!r}, which "
                "keeps none; resume with the strategies that wrote the checkpoint"
            )

    @property
    def apart(self) -> Literal["no", "may", "must"]:
        """Whether what trained can, or can only, be written without the model it belongs to."""
        return "no"

    def save_apart(self, folder: Path) -> None:
        """Write what trained, without the model that it belongs to, into a folder."""
        raise NotImplementedError

    def load_apart(self, folder: Path) -> bool:
        """Load what `save_apart` wrote into a folder; False where it is not there."""
        return False

    def export(self, model: nn.Module) -> None:
        """Turn `model` into what plain transformers loads. Default: it already is."""

    def detach(self) -> None:
        """Undo what `run` does not undo by itself (`replace`, `recast`, `requires_grad`)."""
