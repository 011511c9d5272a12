"""Fills a model on meta from safetensors files, as transformers' `from_pretrained` does.

Names, prefixes, conversions, tied names, missing and unexpected weights follow transformers; a
weight of the wrong shape is an error here. Source: `core_model_loading` and `tie_weights`,
transformers 5.23.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memrt.initialization import initialize
from memrt.weight_files import assign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from memrt.initialization import Skeleton
    from memrt.weight_files import Assignment, WeightFiles
    from memrt.weight_slots import WeightSlots

__all__ = ["Checkpoint", "cast_plan", "refuse_unknown"]


def cast_plan(model: Any, dtype: torch.dtype) -> Callable[[str, torch.dtype], torch.dtype]:
    """The dtype of a checkpoint's tensor: the model's, but for what a family keeps in fp32."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name, own: own
    pattern, by_group, _ = build_glob_alternation(list(plan))

    def target(name: str, own: torch.dtype) -> torch.dtype:
        match = pattern.search(name)
        chosen: torch.dtype = own if match is None else plan[by_group[match.lastgroup]]
        return chosen

    return target


class Checkpoint:
    """Fills a skeleton from files, as `from_pretrained` does."""

    def __init__(
        self, skeleton: Skeleton, slots: WeightSlots, files: WeightFiles, dtype: torch.dtype
    ) -> None:
        self.skeleton = skeleton
        self.model = skeleton.model
        self.slots = slots
        self.files = files
        self.dtype_of = cast_plan(self.model, dtype)

    def load(self, device: torch.device) -> list[str]:
        """Fill every tensor; returns what the user should be told."""
        assignment = assign(self.model, self.files, lambda key, name: self.read(key, name, device))
        notes = self._settle_ties(assignment)
        for name, key in assignment.plain.items():
            if name not in self.slots.ties:
                self._check(name, self.files.shape(key), self.files.path(key))
                self.slots.fill(name, lambda k=key, n=name: self.read(k, n, device))  # type: ignore[misc]
        for name, rule in assignment.converted.items():
            self._convert(name, rule)
        self.model._weight_conversions = assignment.used
        missing = self.model.state_dict().keys() - self.slots.done - self.slots.ties.keys()
        self._initialise(missing, device)
        return [*notes, *self._report(missing, assignment.unexpected)]

    def read(self, key: str, name: str, device: torch.device) -> Tensor:
        """A tensor of the files, as the model's tensor `name` wants it."""
        dtype = self.dtype_of(name, self.slots.meta[name].dtype)
        return self.files.read(key).to(device=device, dtype=dtype)

    def _check(self, name: str, shape: tuple[int, ...], where: Path | str) -> None:
        wanted = tuple(self.slots.meta[name].shape)
        if shape != wanted:
            raise ValueError(
                f"{where}: {name!r} has shape {list(shape)}, the config makes it {list(wanted)}; "
                "load with the config that the weights were saved with"
            )

    def _convert(self, name: str, rule: Any) -> None:
        model = self.model
        try:
            parts: dict[str, Any] = rule.convert(name, model=model, config=model.config)
        except RuntimeError as error:
            raise ValueError(
                f"{name!r}: the checkpoint's parts do not fit together ({error}); "
                "load with the config that the weights were saved with"
            ) from error
        for part in list(parts):
            value = parts.pop(part)
            tensors = value if isinstance(value, list) else [value]
            del value
            self._check(part, tuple(tensors[0].shape), "the checkpoint")
            self.slots.fill(part, tensors.pop)

    def _settle_ties(self, assignment: Assignment) -> list[str]:
        """Tie to the name that the files hold; two that differ stay apart, as in transformers."""
        notes = []
        slots, plain = self.slots, assignment.plain
        for source in dict.fromkeys(slots.ties.values()):
            aliases = [name for name, leader in slots.ties.items() if leader == source]
            held = [name for name in (source, *aliases) if name in assignment.provided]
            leader = held[0] if held else source
            for name in (source, *aliases):
                slots.ties.pop(name, None)
                if name == leader:
                    continue
                if name not in held or self._equal(plain.get(name), plain.get(leader), name):
                    slots.ties[name] = leader
                    continue
                self.model.all_tied_weights_keys.pop(name, None)
                notes.append(
                    f"the config ties {name} to {leader}, but the checkpoint holds different "
                    "values; they were not tied (set tie_word_embeddings=False in the config)"
                )
        return notes

    def _equal(self, first: str | None, second: str | None, name: str) -> bool:
        if first is None or second is None:
            return False
        return self.files.same(first, second, self.slots.meta[name].dtype)

    def _initialise(self, missing: set[str], device: torch.device) -> None:
        temporary = {name for name, _ in self.model.named_non_persistent_buffers()}
        wanted = (missing | temporary) - self.slots.done
        refuse_unknown(self.skeleton, wanted)
        initialize(self.skeleton.tree_calls(), self.slots, wanted=wanted, device=device)

    def _report(self, missing: set[str], unexpected: set[str]) -> Iterator[str]:
        found = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
        self.model._adjust_missing_and_unexpected_keys(found)
        kind = type(self.model).__name__
        if found.missing_keys:
            yield (
                f"the checkpoint lacks weights of {kind}, which were initialised and need "
                f"training: {_listed(found.missing_keys)}"
            )
        if found.unexpected_keys:
            yield (
                f"the checkpoint holds weights that {kind} does not have, which were left out: "
                f"{_listed(found.unexpected_keys)}"
            )


def _listed(names: set[str], limit: int = 8) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def refuse_unknown(skeleton: Skeleton, wanted: set[str]) -> None:
    unknown = set(skeleton.never_written()) & wanted
    if unknown:
        raise ValueError(
            f"{type(skeleton.model).__name__} leaves values to its constructor that its "
            f"_init_weights does not set: {_listed(unknown)}; build it with from_config or "
            "from_pretrained and use memrt.prepare"
        )
