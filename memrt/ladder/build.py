"""Builds a side network from settings and hangs it below a model's blocks, through the run."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from memrt.ladder.attach import (
    CHILD,
    climbing,
    final_norm,
    holders,
    joining,
    modules_before_the_join,
    resting,
    rotary_modules,
    still,
    turn,
    turning,
)
from memrt.ladder.fisher import Scores, fisher_scores
from memrt.ladder.narrowing import Narrowing, Projection, Selection
from memrt.ladder.principal import pooled_directions, principal_directions
from memrt.ladder.prune import copy_hidden, copy_pruned, hidden_channels
from memrt.ladder.roles import Cut, check_prunable, linears
from memrt.ladder.rung import EncoderEnd, Join, Rung, Stream
from memrt.ladder.shape import (
    Widths,
    body_of,
    drawing,
    narrow_block,
    narrow_body,
    narrow_config,
    plain_widths,
)
from memrt.ladder.taps import Gate, Tap, make_tap

if TYPE_CHECKING:
    from memrt.session import Session
    from memrt.structure import Facts, LayerStack

__all__ = ["build_ladder", "prunes"]

logger = logging.getLogger(__name__)


class Settings(Protocol):
    """What a ladder is built from."""

    @property
    def reduction(self) -> int: ...
    @property
    def taps(self) -> str: ...
    @property
    def kept(self) -> str: ...
    @property
    def gate(self) -> str: ...
    @property
    def start(self) -> str: ...
    @property
    def init(self) -> str: ...
    @property
    def probe_batches(self) -> int: ...
    @property
    def checkpoint(self) -> bool: ...
    @property
    def seed(self) -> int: ...

    def rungs(self, num_layers: int) -> list[int]:
        """The blocks of a stack that have a rung."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """The narrow modules of one stack and how wide they are."""

    blocks: list[nn.Module]
    norm: nn.Module | None
    rotaries: dict[str, nn.Module]
    """By the name of the backbone's own."""
    cut: Cut
    like: Tensor
    residual: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """How hidden channels become fewer, and by which scores heads and neurons are chosen."""

    narrowing: Narrowing
    scores: Scores | None


def build_ladder(run: Session, settings: Settings) -> list[nn.Module]:
    """Hang a side network below every stack; returns the modules that stay in evaluation mode."""
    model, structure = run.model, run.facts.structure
    kept = _kept(run, settings)  # before anything of the side takes memory
    sides = [_side(run, stack, settings) for stack in structure.stacks]
    streams: list[Stream] = []
    quiet = []
    for index, (stack, side) in enumerate(zip(structure.stacks, sides, strict=True)):
        count = len(stack.layers)
        stream = Stream(stack.name, count, settings.rungs(count))
        stream.encoder = streams[0] if streams else None
        streams.append(stream)
        last = index == len(sides) - 1
        quiet += _hang(run, stack, side, stream, settings, kept, joins=last)
    for name in modules_before_the_join(model, structure):
        module = model.get_submodule(name)
        kind: Any = type(module)
        run.recast(name, resting(kind))
        quiet.append(module)
    for module in quiet:
        module.train(model.training)
    return [*(part for module in quiet for part in module.modules()), *_hold(run)]


def _hold(run: Session) -> list[nn.Module]:
    """Keep what goes through the blocks from dropping out by itself; returns those modules."""
    found = []
    for stack in run.facts.structure.stacks:
        body = body_of(run.model, stack)
        for name in [] if body is None else holders(run.model, stack, body):
            module = run.model.get_submodule(name)
            kind: Any = type(module)
            run.recast(name, still(kind))
            module.training = False
            found.append(module)
    return found


def _kept(run: Session, settings: Settings) -> _Kept | None:
    """What the side keeps of the backbone; None when its first weights are random."""
    if not prunes(run.facts, settings):
        return None
    stacks, scores = run.facts.structure.stacks, None
    cuts = [_cut(run.model, stack, settings.reduction) for stack in stacks]
    blocks = [layer for stack in stacks for layer in stack.layers]
    if settings.init == "principal":
        directions = pooled_directions if settings.taps == "pooled" else principal_directions
        found = directions(
            run,
            [stack.layers for stack in stacks],
            side=cuts[0].narrow.hidden,
            count=settings.probe_batches,
        )
        return _Kept(narrowing=found, scores=None)
    if settings.init == "fisher":
        weights = [
            module
            for stack, cut in zip(stacks, cuts, strict=True)
            for module in linears(stack.layers, cut)
        ]
        scores = fisher_scores(run, blocks, weights, count=settings.probe_batches)
    if settings.taps == "pooled":
        wide, narrow = cuts[0].wide.hidden, cuts[0].narrow.hidden
        device = next(blocks[0].parameters()).device
        return _Kept(narrowing=Projection.pooling(wide, narrow, device=device), scores=scores)
    with torch.no_grad():
        channels = hidden_channels(blocks, cuts[0], scores)
    return _Kept(narrowing=Selection(channels), scores=scores)


def prunes(facts: Facts, settings: Settings) -> bool:
    """Whether the side's first weights are cut out; refuses what cannot be when it must."""
    if settings.init == "random":
        return False
    try:
        for stack in facts.structure.stacks:
            check_prunable(stack.layers, _cut(facts.model, stack, settings.reduction))
    except ValueError as refused:
        if settings.init != "auto":
            raise
        logger.warning("ladder: the side network starts from random weights, for %s", refused)
        return False
    return True


def _cut(model: nn.Module, stack: LayerStack, reduction: int) -> Cut:
    """From which widths to which a stack is cut."""
    body_name = body_of(model, stack)
    if body_name is not None:
        config: Any = model.get_submodule(body_name).config
        return Cut(wide=Widths.of(config), narrow=Widths.of(narrow_config(config, reduction)))
    return Cut(wide=plain_widths(stack.layers[0]), narrow=plain_widths(stack.layers[0], reduction))


# ---------------------------------------------------------------- narrow modules


def _side(run: Session, stack: LayerStack, settings: Settings) -> _Side:
    model = run.model
    like = next(p for p in stack.layers[0].parameters() if p.is_floating_point())
    cut = _cut(model, stack, settings.reduction)
    body_name = body_of(model, stack)
    if body_name is None:
        return _plain_side(stack, settings, like, cut)
    body = model.get_submodule(body_name)
    narrow = narrow_body(body, settings.reduction, like=like, seed=settings.seed)
    inside = {id(m) for layer in stack.layers for m in layer.modules()}
    norm = final_norm(model, stack)
    start = len(body_name) + 1 if body_name else 0
    narrow_norm = None if norm is None else narrow.get_submodule(norm[start:])
    return _Side(
        blocks=list(narrow.get_submodule(stack.name[start:]).children()),
        norm=narrow_norm,
        rotaries={
            f"{body_name}.{name}" if body_name else name: narrow.get_submodule(name)
            for name in rotary_modules(body, inside)
        },
        cut=cut,
        like=like,
        residual=False,
    )


def _plain_side(stack: LayerStack, settings: Settings, like: Tensor, cut: Cut) -> _Side:
    """A plain module's blocks may be branches of a residual stream, so the side has one around."""
    blocks = [
        narrow_block(
            layer,
            settings.reduction,
            hidden=cut.wide.hidden,
            like=like,
            seed=settings.seed + index,
        )
        for index, layer in enumerate(stack.layers)
    ]
    return _Side(blocks=blocks, norm=None, rotaries={}, cut=cut, like=like, residual=True)


# ---------------------------------------------------------------- hanging


def _hang(
    run: Session,
    stack: LayerStack,
    side: _Side,
    stream: Stream,
    settings: Settings,
    kept: _Kept | None,
    *,
    joins: bool,
) -> list[nn.Module]:
    rungs = [Rung(stream, index) for index in range(len(stack.layers))]
    with drawing(settings.seed, side.like):
        _fill(stack, rungs, side, settings, kept)
        norm_name = final_norm(run.model, stack) if side.norm is not None else None
        if norm_name is not None and side.norm is not None and kept is not None:
            copy_hidden(run.model.get_submodule(norm_name), side.norm, kept.narrowing)
        wide, narrow = side.cut.wide.hidden, side.cut.narrow.hidden
        end: Join | EncoderEnd = (
            Join(stream, wide, narrow, form=settings.start, norm=side.norm)
            if joins
            else EncoderEnd(stream, norm=side.norm)
        )
    quiet = []
    if norm_name is None:
        rungs[-1].end = end
    else:
        quiet.append(run.model.get_submodule(norm_name))
        _recast(run, norm_name, joining, end)
    for index, rung in enumerate(rungs):
        quiet.append(stack.layers[index])
        _recast(run, stack.layer_name(index), climbing, rung)
    for name, rotary in side.rotaries.items():
        _recast(run, name, turning, turn(rotary, [stream]))
    return quiet


def _recast(run: Session, name: str, made: object, child: nn.Module) -> None:
    assert callable(made)
    kind = type(run.model.get_submodule(name))
    run.add(f"{name}.{CHILD}", child)
    run.recast(name, made(kind))


def _fill(
    stack: LayerStack,
    rungs: list[Rung],
    side: _Side,
    settings: Settings,
    kept: _Kept | None,
) -> None:
    """Give the chosen rungs a tap, a gate and a block, and the first a stem."""
    wide, narrow = side.cut.wide.hidden, side.cut.narrow.hidden

    def tap(first: Tap | None = None) -> Tap:
        made = make_tap(settings.taps, wide, narrow, kept=settings.kept, first=first)
        if kept is not None:
            made.begin(kept.narrowing)
        return made

    rungs[0].stem = stem = tap()
    for position, index in enumerate(settings.rungs(len(stack.layers))):
        rung, block = rungs[index], side.blocks[index]
        handed_on = "position_bias" in inspect.signature(block.forward).parameters
        for module in block.modules():
            if handed_on and getattr(module, "has_relative_attention_bias", False):
                # the side adds its heads' part of the backbone's bias
                vars(module)["has_relative_attention_bias"] = False
                for table in ("relative_attention_bias", "global_relative_attention_bias"):
                    module._modules.pop(table, None)
            for place in ("layer_idx", "layer_id"):  # in the key-value cache
                if hasattr(module, place):
                    vars(module)[place] = len(stack.layers) + position
        heads = None
        if kept is not None:
            with torch.no_grad():
                heads = copy_pruned(
                    stack.layers[index], block, side.cut, kept.narrowing, kept.scores
                )
        rung.tap, rung.gate = tap(stem), Gate(settings.gate, narrow)
        rung.block, rung.residual = block, side.residual
        rung.checkpointed = settings.checkpoint
        rung.heads = _bias_heads(block, heads, side)


def _bias_heads(block: nn.Module, heads: Tensor | None, side: _Side) -> Tensor | None:
    """The backbone's heads whose bias on attention scores the side's heads take over."""
    if "position_bias" not in inspect.signature(block.forward).parameters:
        return None
    count = side.cut.narrow.heads
    return torch.arange(count, device=side.like.device) if heads is None else heads[:count]
