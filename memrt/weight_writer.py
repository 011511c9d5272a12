"""Safetensors shards written one tensor at a time, as `save_pretrained` names and groups them.

A safetensors file is a JSON header with every tensor's place, then the bytes. Shapes are known
before values are, so the header goes first and each tensor after it, and nothing but the tensor
that is being written has to be held; `safetensors.torch.save_file` holds a shard, twice. Source:
the format's description in safetensors 0.8; names and index of transformers 5.23.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["Entry", "parse_size", "plan_shards", "write_shards"]

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_UNITS = {
    "": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor that is to be written: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def parse_size(text: str | int) -> int:
    """Bytes of "5GB" (10⁹), "500MiB" (2²⁰) or a whole number."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B)?\s*", str(text))
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError(f"max_shard_size={text!r}: must be bytes, such as 5GB or 500MiB")
    return size


def plan_shards(entries: Sequence[Entry], *, max_bytes: int) -> list[list[Entry]]:
    """Consecutive tensors of at most `max_bytes` a shard; a larger tensor has its own."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    return shards


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    tensor_of: Callable[[str], Tensor],
    *,
    max_bytes: int,
    on_written: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write the tensors that `tensor_of` gives, each when its turn comes; returns the file names.

    `tensor_of` is called once for each name, in the order of `entries` within a dtype.
    """
    shards = plan_shards(entries, max_bytes=max_bytes)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [
            f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            for index in range(1, len(shards) + 1)
        ]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, tensor_of, on_written)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(torch.Size(entry.shape).numel() for entry in entries),
                "total_size": sum(entry.num_bytes for entry in entries),
            },
            "weight_map": {
                entry.name: name
                for name, shard in zip(names, shards, strict=True)
                for entry in shard
            },
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return names


def _write(
    path: Path,
    shard: Sequence[Entry],
    tensor_of: Callable[[str], Tensor],
    on_written: Callable[[], None],
) -> None:
    # wide dtypes first, so that every tensor lies at a multiple of its item's size
    ordered = sorted(shard, key=lambda entry: -entry.dtype.itemsize)
    with path.open("wb") as file:
        file.write(_header(ordered))
        for entry in ordered:
            file.write(_bytes_of(tensor_of(entry.name), entry))
            on_written()


def _header(ordered: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor, entry: Entry) -> Any:
    """The tensor's own memory, as a buffer."""
    assert tuple(tensor.shape) == entry.shape, (entry, tuple(tensor.shape))
    assert tensor.dtype is entry.dtype, (entry, tensor.dtype)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
