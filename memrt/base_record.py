"""What adapters know their base by: a hash beside their files, compared before they are used.

    adapter_config.json, adapter_model.safetensors    PEFT's, unchanged: plain PEFT loads the folder
    memrt_base.json    version, the base's class, its hash, what the hash leaves out, its head, what
                       a classifier's config says of that (`memrt.head_config`), sums of weights

The hash is that of a ladder's backbone (`memrt.ladder.files`): SHA-256 over what every precision
keeps, the embeddings, norms and biases, rounded to bfloat16. What trained beside the adapters is
left out, by name; what is frozen of a task's head, which each load may draw anew, is in. float16
rounds to other numbers on its way to bfloat16, so that where either base is in float16 and the hash
differs, sums of the same tensors are compared (`Lasting`). A folder without the file, such as PEFT
writes, loads as it always did.

The weights of the blocks differ in bits between precisions; of each are kept a few sums, compared
within what rounding does (`memrt.weight_sums`). Left out: what trained, PEFT's starts that change
weights, folded adapters, packed forms of others (bitsandbytes), and what is outside of blocks,
which a load may draw anew (poolers). Weights that were packed once and are dense again are others
than they were before. Files without sums are compared by the hash alone.

Costs one pass over the embeddings and the blocks' weights when the first checkpoint is written and
when one is read: 70 billion are 2 TFLOP where they lie, minutes on a CPU; beside them 64 MiB, or
one weight made dense where they are packed. Of embeddings 32 MiB at a time lie on the host.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memrt.base_parts import (
    copied_names,
    embedding_ids,
    head_names,
    inner_model,
    lasting_parameters,
    lasts,
    own_parameters,
    trained_names,
)
from memrt.head_config import HeadConfig
from memrt.packed_weights import packed_layers
from memrt.structure import discover
from memrt.weight_sums import checked_sums, sums_differ, weight_sums

__all__ = [
    "BASE_NAME",
    "BaseRecord",
    "Lasting",
    "base_hash",
    "base_lasting",
    "base_record",
    "base_weights",
    "changed_weight",
    "is_base",
    "lasting_names",
    "require_base",
    "require_base_tensors",
]

BASE_NAME = "memrt_base.json"

_VERSION = 1
_PIECE_ELEMENTS = 1 << 24
_DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasting:
    """What a base's hash is of, again: sums of every tensor, and whether any is in float16.

    Sums tell tensors apart that differ by 0.4 % of their norm (`memrt.weight_sums`), where float16
    rounds by 0.15 %; the hash, which tells everything, is asked first.
    """

    sums: Mapping[str, str] = field(default_factory=dict)
    is_half: bool = False

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Callable[[], Tensor]]]) -> Lasting:
        """Sums of these, in one pass."""
        sums, is_half = {}, False
        for name, make in tensors:
            tensor = make()
            is_half = is_half or tensor.dtype is torch.float16
            sums[name] = weight_sums(tensor, packed=False)
        return cls(sums=sums, is_half=is_half)

    @classmethod
    def from_json(cls, values: Any) -> Lasting:
        """What `to_json` gave; `ValueError` where it is not that."""
        if not isinstance(values, dict) or not isinstance(values.get("float16"), bool):
            raise ValueError(f"lasting={values!r}")
        return cls(sums=checked_sums(values.get("sums")), is_half=values["float16"])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"float16": self.is_half, "sums": dict(self.sums)}

    def agrees(self, tensors: Iterable[tuple[str, Callable[[], Tensor]]]) -> bool:
        """Whether float16 explains that a hash of these is another."""
        if not self.sums:
            return False
        found = Lasting.of(tensors)
        if not (self.is_half or found.is_half) or found.sums.keys() != self.sums.keys():
            return False
        return not any(sums_differ(self.sums[name], sums) for name, sums in found.sums.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """One base."""

    model: str
    """Its class."""
    fingerprint: str
    left_out: tuple[str, ...] = ()
    """Parameters that a hash would take and that trained, or were trained as copies."""
    head: tuple[str, ...] = ()
    """Frozen parameters of a task's head, which the hash takes too."""
    head_config: HeadConfig | None = None
    """Of a classifier: what its config says of the head, which a base may know nothing of."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Of each weight of the blocks: dense or packed, count, norm and sums."""
    lasting: Lasting = field(default_factory=Lasting)

    def write(self, folder: Path) -> None:
        """Beside the adapters."""
        values: dict[str, Any] = {
            "version": _VERSION,
            "model": self.model,
            "base": self.fingerprint,
            "left_out": list(self.left_out),
            "head": list(self.head),
        }
        if self.head_config is not None:
            values["head_config"] = self.head_config.to_json()
        if self.weights:
            values["weights"] = dict(self.weights)
        if self.lasting.sums:
            values["lasting"] = self.lasting.to_json()
        (folder / BASE_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> BaseRecord | None:
        """What a folder says of its adapters' base; None where it says nothing."""
        path = folder / BASE_NAME
        if not path.is_file():
            return None
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version, fingerprint = values["version"], str(values["base"])
            said, lasting = values.get("head_config"), values.get("lasting")
            found = cls(
                model=str(values["model"]),
                fingerprint=fingerprint,
                left_out=tuple(map(str, values["left_out"])),
                head=tuple(map(str, values.get("head", ()))),
                head_config=None if said is None else HeadConfig.from_json(said),
                weights=checked_sums(values.get("weights", {})),
                lasting=Lasting() if lasting is None else Lasting.from_json(lasting),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again") from error
        if version != _VERSION:
            raise ValueError(
                f"{path} has version {version!r}, this memrt reads {_VERSION}; load the adapters "
                "with the memrt that wrote them"
            )
        return found

    def refuse(self, folder: Path, base: str, weight: str | None = None) -> ValueError:
        """For another base than this; `weight` names what differs, else the hash does."""
        differing = f"embeddings, norms or biases{' or the head' * bool(self.head)} differ"
        return ValueError(
            f"the adapters in {folder} were trained on another base (a {self.model}) than {base}: "
            f"{differing if weight is None else f'{weight} differs'}; give the model "
            "that they were trained on "
            f"(deleting {BASE_NAME} there leaves the base unchecked)"
        )


def base_record(model: nn.Module) -> BaseRecord:
    """Of a model, with or without adapters in it."""
    model = inner_model(model)
    changed = {*trained_names(model), *copied_names(model)}
    head = tuple(name for name in head_names(model) if name not in changed)
    lasting = dict(lasting_parameters(model, head))
    left_out = sorted(changed & lasting.keys())
    return BaseRecord(
        model=type(model).__name__,
        fingerprint=_digest(_in_memory(lasting, left_out)),
        left_out=tuple(left_out),
        head=head,
        head_config=HeadConfig.of(model),
        weights=base_weights(model, left_out={*changed, *head}),
        lasting=Lasting.of(_in_memory(lasting, left_out)),
    )


def is_base(
    model: nn.Module,
    fingerprint: str,
    lasting: Lasting,
    *,
    left_out: Collection[str],
    head: Collection[str] = (),
) -> bool:
    """Whether a loaded model has the hash, or would have it but for float16."""
    if base_hash(model, left_out=left_out, head=head) == fingerprint:
        return True
    return lasting.agrees(_in_memory(dict(lasting_parameters(model, head)), left_out))


def base_lasting(model: nn.Module, *, left_out: Collection[str]) -> Lasting:
    """Sums of what `base_hash` is of."""
    return Lasting.of(_in_memory(dict(lasting_parameters(model)), left_out))


def base_hash(model: nn.Module, *, left_out: Collection[str], head: Collection[str] = ()) -> str:
    """SHA-256 over what every precision keeps of a loaded model, but for these parameters.

    `head`: parameters that are taken in, whatever they are.
    """
    return _digest(_in_memory(dict(lasting_parameters(model, head)), left_out))


def require_base(model: nn.Module, folder: str | Path) -> None:
    """Refuse a model that is not the base of the adapters in `folder`, where the folder knows."""
    record = BaseRecord.read(Path(folder))
    if record is None:
        return
    model = inner_model(model)
    given = (record.fingerprint, record.lasting)
    if not is_base(model, *given, left_out=record.left_out, head=record.head):
        raise record.refuse(Path(folder), f"this {type(model).__name__}")
    weight = changed_weight(model, record.weights)
    if weight is not None:
        raise record.refuse(Path(folder), f"this {type(model).__name__}", weight)


def require_base_tensors(
    groups: Collection[tuple[str, ...]],
    made: Mapping[str, Callable[[], Tensor]],
    folder: Path,
    *,
    base: str,
    packed: bool = False,
) -> bool:
    """The same for a base whose tensors are made one at a time; False: it cannot be told.

    `groups` is what `lasting_names` gave; one of the names of each must be among `made`. `packed`:
    weights may be made of packed ones.
    """
    record = BaseRecord.read(folder)
    if record is None:
        return True
    out = set(record.left_out)
    held = [
        (group[0], next((made[name] for name in group if name in made), None))
        for group in groups
        if group[0] not in out
    ]
    if any(make is None for _, make in held):
        return False
    there = [(name, make) for name, make in held if make is not None]
    if _digest(there) != record.fingerprint and not record.lasting.agrees(there):
        raise record.refuse(folder, base)
    weights = ((name, make, packed) for name, make in made.items())
    weight = _first_changed(weights, record.weights)
    if weight is not None:
        raise record.refuse(folder, base, weight)
    return True


# ---------------------------------------------------------------- what is hashed


def lasting_names(model: Any, folder: Path) -> list[tuple[str, ...]]:
    """The parameters that a folder's hash takes, for a model on meta: nothing of it is tied yet.

    Each comes with the names that share it in the loaded model, the first of them first.
    """
    record = BaseRecord.read(folder)
    head = () if record is None else record.head
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    embeddings = embedding_ids(model)
    groups: dict[str, list[str]] = {}
    lasting: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        leader = ties.get(name, name)
        groups.setdefault(leader, []).append(name)
        if lasts(parameter, embeddings) or name in head:
            lasting.add(leader)
    return [tuple(names) for leader, names in groups.items() if leader in lasting]


def _in_memory(
    lasting: dict[str, nn.Parameter], left_out: Collection[str]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    out = set(left_out)
    for name, parameter in lasting.items():
        if name not in out:
            yield name, parameter.detach


def _digest(tensors: Iterable[tuple[str, Callable[[], Tensor]]]) -> str:
    digest = hashlib.sha256()
    for name, make in tensors:
        tensor = make()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        for piece in torch.split(tensor.reshape(-1), _PIECE_ELEMENTS):
            rounded = piece.to(torch.bfloat16).contiguous().cpu()
            digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- what is summed


def base_weights(model: nn.Module, *, left_out: Collection[str]) -> dict[str, str]:
    """What tells the weights of a loaded model's blocks in every precision, but for these."""
    return {
        name: weight_sums(make(), packed=packed)
        for name, make, packed in _block_weights(model)
        if name not in left_out
    }


def changed_weight(model: nn.Module, recorded: Mapping[str, str]) -> str | None:
    """The first weight that is not what was recorded of it."""
    return _first_changed(_block_weights(model), recorded) if recorded else None


def _first_changed(
    weights: Iterable[tuple[str, Callable[[], Tensor], bool]], recorded: Mapping[str, str]
) -> str | None:
    for name, make, packed in weights:
        if name in recorded and sums_differ(recorded[name], weight_sums(make(), packed=packed)):
            return name
    return None


def _block_weights(model: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor], bool]]:
    """Weights as the base has them: how each is made dense, and whether it is packed."""
    if any(map(_changes_weights, getattr(model, "peft_config", {}).values())):
        return
    layers = [layer for stack in discover(model).stacks for layer in stack.layers]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    folded = [module for module in model.modules() if getattr(module, "merged", False) is True]
    inside -= {id(parameter) for module in folded for parameter in module.parameters()}
    packed = {id(module.weight): module.dense for _, module in packed_layers(model)}
    for name, parameter in own_parameters(model):
        tensor, dense = parameter.detach(), packed.get(id(parameter))
        plain = tensor.ndim > 1 and tensor.dtype in _DENSE_DTYPES and type(tensor) is Tensor
        if id(parameter) not in inside or tensor.is_meta or not tensor.numel():
            continue
        if dense is not None:
            yield name, partial(dense, tensor), True
        elif plain:
            yield name, tensor.detach, False


def _changes_weights(config: Any) -> bool:
    """Whether adapters of this kind begin by taking something out of the weights."""
    start = getattr(config, "init_lora_weights", None)
    known = not isinstance(start, str) or start.lower() in ("gaussian", "orthogonal", "eva")
    return not known or getattr(config, "kasa_config", None) is not None
