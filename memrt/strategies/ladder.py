"""Ladder side-tuning: a narrow network beside a frozen backbone, which keeps nothing for backward.

After the backbone's block i, with output H_i [tokens, hidden], the side's state S [tokens, side],
side = hidden / reduction, climbs one rung:

    Z = g_i S + (1 - g_i) down_i(H_i),   S <- block_i(Z),   at the start S = down_0(embeddings)

and at the end `hidden states + up(norm(S))` goes into the model's own head. The backbone's blocks
run without gradients and in evaluation mode; what trains is the side network (and the task head of
a model without a language-model head). With `start="exact"` up begins at zero, so that the model
starts bit for bit as the backbone; "lst", "lst_merged" and "qst" start as the papers' code does.

Bytes kept for backward, in elements a token and layer: nothing of the backbone but the taps. A
"linear" (LST) or "low_rank" (QST) tap keeps `hidden` (33 bytes for 32 with `kept="float8"`),
"pooled" and "projected" taps nothing; the side's blocks keep about 19 side, with `checkpoint` 1.
Weights grow by about 1/reduction² of the blocks' and by taps, hidden · side for each linear one or
for all projected ones together. A step costs a forward of the backbone and about 3/reduction² more.
Beside a bf16 backbone the side is bf16, with fp32 moments and stochastic rounding.

With `init="fisher"` the side's first weights are chosen on data before the first step, which takes
what a batch takes with every block checkpointed: see `memrt.ladder.fisher`. With `"principal"` they
are made of the directions that hidden states have, for a forward a batch: `memrt.ladder.principal`.

LST: Sung et al. 2022, arXiv 2206.06522. QST, with `nf4`: Zhang et al. 2024, arXiv 2401.07159.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from memrt.kernels.ladder import KEPT
from memrt.ladder.attach import final_norm, task_head
from memrt.ladder.build import build_ladder, prunes
from memrt.ladder.files import fill_side, has_ladder_files, write_ladder
from memrt.ladder.refusals import (
    refuse_adapters,
    refuse_arguments,
    refuse_leftovers,
    require_once,
)
from memrt.ladder.shape import body_of, narrow_config
from memrt.optimizer_slots import wide_moments
from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategy import Attachment, Claim, Phase, Rule, Slot, Strategy
from memrt.values import check_seed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from memrt.session import Session
    from memrt.structure import Facts, LayerStack

__all__ = ["Ladder"]

TAPS = ("linear", "low_rank", "pooled", "projected")
FIXED_TAPS = ("pooled", "projected")
GATES = ("scalar", "vector")
STARTS = ("exact", "lst", "lst_merged", "qst")
INITS = ("auto", "magnitude", "fisher", "principal", "random")
ON_DATA = ("fisher", "principal")
HEADS = ("auto", "frozen", "trained")


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder(Strategy):
    """Settings.

    reduction: how many times narrower the side network is.
    taps: how a hidden state comes down: "linear", "low_rank", "pooled" (neighbouring channels
        summed) or "projected" (onto the directions of `init="principal"`). The last two learn
        nothing; where there is data, "projected" lets more through.
    kept: how a linear or low-rank tap keeps the hidden state: "exact" or "float8".
    gate: "scalar" (one number a rung, as LST) or "vector" (one a channel, as QST).
    start: "exact" (the backbone's own function), "lst", "lst_merged" (half of the backbone's output
        and half of the side's, at first) or "qst" (the papers').
    init: the side's first weights: "magnitude" (cut out of the backbone's, the largest), "fisher"
        (those that the loss on a probe set depends on most), "principal" (its products with the
        directions in which the hidden states of a probe set lie, or with the best guess of them
        from pooled taps), "random", or "auto" ("magnitude"
        where pruning knows every weight of the blocks; experts it does not). What looks at data
        needs `probe_dataset` of the Trainer or `probe_batches` of `memrt.prepare`.
    probe_batches: how many batches of the probe set "fisher" and "principal" look at.
    every: a rung after every n-th block; `layers` names them instead, from 0.
    checkpoint: run the side's blocks again in backward instead of keeping their activations.
    head: what trains behind the join: "auto" (all of it without a language-model head, else
        nothing), "frozen" or "trained".
    seed: of the random weights.
    """

    name: ClassVar[str] = "ladder"
    phase: ClassVar[Phase] = Phase.TRAINABLE  # beside a backbone that others have packed
    lowers: ClassVar[tuple[Account, ...]] = (
        Account.ACTIVATIONS,
        Account.GRADIENTS,
        Account.OPTIMIZER,
    )

    brings_parameters: ClassVar[bool] = True

    reduction: int = 8
    taps: str = "linear"
    kept: str = "exact"
    gate: str = "scalar"
    start: str = "exact"
    init: str = "auto"
    probe_batches: int = 8
    every: int = 1
    layers: tuple[int, ...] = ()
    checkpoint: bool = False
    head: str = "auto"
    seed: int = 42

    def __post_init__(self) -> None:
        for option in ("reduction", "every", "probe_batches"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{option}={value!r}: must be a whole number, 1 or more")
        choices = {
            "taps": TAPS,
            "kept": KEPT,
            "gate": GATES,
            "start": STARTS,
            "init": INITS,
            "head": HEADS,
        }
        for option, known in choices.items():
            value = getattr(self, option)
            if value not in known:
                raise ValueError(f"{option}={value!r}: use one of {', '.join(known)}")
        check_seed(self.seed)
        if not isinstance(self.checkpoint, bool):
            raise ValueError(f"checkpoint={self.checkpoint!r}: must be True or False")
        if self.kept != "exact" and self.taps in FIXED_TAPS:
            raise ValueError(f"kept={self.kept!r}: taps={self.taps!r} keep nothing; leave kept out")
        if self.probe_batches != 8 and self.init not in ON_DATA:
            raise ValueError(
                f"probe_batches={self.probe_batches}: init={self.init!r} looks at no data; use "
                "init='principal' or 'fisher', or leave probe_batches out"
            )
        self._check_layers()

    def _check_layers(self) -> None:
        if isinstance(self.layers, (str, bytes)) or not isinstance(self.layers, Iterable):
            raise ValueError(
                f"layers={self.layers!r}: must be a list of layers from 0, such as "
                "layers=(0, 2); every=2 takes every second"
            )
        object.__setattr__(self, "layers", tuple(self.layers))
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.layers):
            raise ValueError(f"layers={self.layers!r}: must be numbers of layers, from 0")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers={self.layers!r}: names a layer twice")
        if self.layers and self.every != 1:
            raise ValueError(f"every={self.every} and layers={self.layers!r}: give one of the two")

    @property
    def uniform_layers(self) -> bool:
        """Whether every block has a rung."""
        return self.every == 1 and not self.layers

    def rungs(self, num_layers: int) -> list[int]:
        """The blocks of a stack that have a rung."""
        if self.layers:
            return sorted(self.layers)
        return [index for index in range(num_layers) if (index + 1) % self.every == 0]

    def check(self, facts: Facts) -> None:
        """Needs repeated blocks that can be made narrower."""
        kind = type(facts.model).__name__
        stacks = facts.structure.stacks
        if not stacks:
            raise ValueError(f"{kind} has no list of repeated blocks to put a ladder beside")
        encoder_decoder = bool(getattr(facts.config, "is_encoder_decoder", False))
        if len(stacks) > 1 and not (encoder_decoder and len(stacks) == 2):
            names = ", ".join(stack.name for stack in stacks)
            raise ValueError(
                f"{kind} has {len(stacks)} lists of repeated blocks ({names}), not one"
            )
        if getattr(facts.model, "enc_to_dec_proj", None) is not None:
            raise ValueError(
                f"{kind} brings its encoder to the width of its decoder by enc_to_dec_proj, which "
                "the side network has not; use an encoder and a decoder of one width"
            )
        refuse_adapters(facts)
        behind = _behind(facts) if self.head == "frozen" else self.trained_head(facts)
        refuse_leftovers(facts, behind=behind)
        for stack in stacks:
            require_once(facts, stack)
            self._check_stack(facts, stack)
        if self.init in ("magnitude", *ON_DATA):
            prunes(facts, self)
        if self.head == "trained" and not _behind(facts):
            raise ValueError(f"head='trained': {kind} has nothing behind the join that could train")

    def _check_stack(self, facts: Facts, stack: LayerStack) -> None:
        count = len(stack.layers)
        missing = [index for index in self.layers if index >= count]
        if missing:
            raise ValueError(
                f"layers={self.layers!r}: {stack.name} has {count} blocks, so that there is no "
                f"{missing[0]}; the last is {count - 1}"
            )
        if self.every > count:
            raise ValueError(f"every={self.every} is more than the {count} blocks; lower it")
        norm = final_norm(facts.model, stack)
        for name in [*map(stack.layer_name, range(count)), *([] if norm is None else [norm])]:
            if "forward" in vars(facts.model.get_submodule(name)):
                raise ValueError(
                    f"the forward of {name} was replaced on this instance (accelerate's device_map "
                    "does it), so that no ladder would be climbed; put the model on one device"
                )
        body = body_of(facts.model, stack)
        if body is not None:
            config: Any = facts.model.get_submodule(body).config
            if getattr(config, "num_attention_heads", None) is None:
                raise ValueError(f"{stack.name} has no attention heads that could be fewer")
            if getattr(config, "attention_type", None) == "block_sparse":
                raise ValueError(
                    f"attention_type='block_sparse': {stack.name} changes its attention with the "
                    "length of a batch, and the side network could not follow; load the model with "
                    "attention_type='original_full'"
                )
            narrow_config(config, self.reduction)  # refuses what it cannot divide
            refuse_arguments(stack, config)

    def claims(self, facts: Facts) -> list[Claim]:
        """What trains, and the recomputation of the backbone's blocks, which have no backward."""
        trained = set(self.trained_head(facts))
        frozen = frozenset(name for name, _ in facts.parameters() if name not in trained)
        return [
            Claim(slot=Slot.ACTIVE_SET, scope=frozen),
            Claim(slot=Slot.RECOMPUTE, scope=frozenset(facts.structure.layer_names)),
        ]

    def trained_head(self, facts: Facts) -> list[str]:
        """Parameters of the model itself that train: behind the join."""
        if self.head == "frozen":
            return []
        if self.head == "auto":
            return task_head(facts.model, facts.structure)
        return _behind(facts)

    def leaner(self) -> list[tuple[Strategy, str]]:
        """Blocks that are computed again, hidden states in 8 bits, then taps that keep none."""
        found: list[tuple[Strategy, str]] = []
        again = replace(self, checkpoint=True)
        if not self.checkpoint:
            found.append((again, "the same numbers; its blocks are computed again in backward"))
        if self.taps not in FIXED_TAPS and self.kept == "exact":
            eighth = replace(again, kept="float8")
            found.append((eighth, "its taps keep hidden states in 8 bits"))
        if self.taps not in FIXED_TAPS:
            pooled = replace(again, taps="pooled", kept="exact")
            found.append((pooled, "its taps learn nothing and keep nothing"))
        return found

    def attach(self, run: Session) -> Attachment:
        """Freeze the backbone and hang the side network below it."""
        return _Ladder(self, run)


def _behind(facts: Facts) -> list[str]:
    """Parameters behind the join: the task head, or a language model's head that is not tied."""
    head = facts.structure.head
    if head is None:
        return task_head(facts.model, facts.structure)
    names = [f"{head}.{name}" for name, _ in facts.model.get_submodule(head).named_parameters()]
    return [name for name in names if name not in facts.structure.tied]


class _Ladder(Attachment):
    settings: Ladder

    def __init__(self, settings: Ladder, run: Session) -> None:
        super().__init__(settings, run)
        trained = set(settings.trained_head(run.facts))
        for name, parameter in run.model.named_parameters():
            if name not in trained:
                parameter.requires_grad_(False)
        self._mode = run.model.training
        before = {module: module.training for module in run.model.modules()}
        resting = build_ladder(run, settings)
        self._modes = {module: before[module] for module in resting if module in before}

    def rules(self) -> list[Rule]:
        """fp32 moments for a side network of bf16 or fp16."""
        return wide_moments(self.run)

    @property
    def apart(self) -> Literal["no", "may", "must"]:
        """A side network is no part of any plain model."""
        return "must"

    def save_apart(self, folder: Path) -> None:
        """The side network, as `memrt.load_ladder` takes it."""
        write_ladder(
            self.run.model,
            folder,
            settings=self.settings.to_json(),
            trained=self.settings.trained_head(self.run.facts),
        )

    def load_apart(self, folder: Path) -> bool:
        """The side network, on the backbone that it was trained beside only."""
        if not has_ladder_files(folder):
            return False
        fill_side(self.run.model, folder, trained=self.settings.trained_head(self.run.facts))
        return True

    def export(self, model: nn.Module) -> None:
        """A side network is no part of any plain model."""
        raise ValueError(
            "a ladder's side network cannot be folded into the model's own weights; write it with "
            "memrt.save_ladder(session, folder) and put it on its backbone with "
            "memrt.load_ladder(model, folder)"
        )

    def detach(self) -> None:
        """Give the backbone its modes back; where the model's has changed since, that."""
        mode = self.run.model.training
        for module, before in self._modes.items():
            module.training = before if mode is self._mode else mode
