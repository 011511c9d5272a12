"""Sizes of GPUs, and what a device needs beyond the bytes that tensors hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["Gpu", "Host", "Overhead", "check_budget", "next_card"]

# Total memory in MiB as nvidia-smi shows it, by which drivers and clouds sell; the sources are
# Modal's list of its cards (modal-client pull request 2797, and the H200 in its maker's article on
# it) and nvidia-smi outputs in public issue threads for the RTX 3090 and 5090; for the RTX 4090 no
# source was kept. Not measured by memrt.
_CARDS_MIB = {
    "t4": 15_360,
    "l4": 23_034,
    "a10": 23_028,
    "rtx3090": 24_576,
    "rtx4090": 24_564,
    "rtx5090": 32_607,
    "a100-40": 40_960,
    "l40s": 46_068,
    "a100-80": 81_920,
    "h100": 81_559,
    "h200": 143_771,
}

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

# What the allocator cannot see. CUDA context with PyTorch's kernels: reports in pytorch issues
# 37250, 101159 and 28113 lie between 200 and 700 MiB; not measured by memrt, so it is a range.
_CONTEXT_BYTES = {"low": 200 * 2**20, "expected": 500 * 2**20, "high": 700 * 2**20}
# cuBLAS workspace as PyTorch asks for it: 8,519,680 bytes before Hopper, 32 MiB on Hopper
# (aten/src/ATen/cuda/CublasHandlePool.cpp).
_CUBLAS_BYTES = {"low": 8_519_680, "expected": 8_519_680, "high": 32 * 2**20}
# Bytes that the caching allocator reserves and cannot use; no bound is known, 5 % is what PyTorch's
# own memory guides call ordinary. The low bound has none.
_FRAGMENTATION = {"low": 0.0, "expected": 0.02, "high": 0.05}


_SMALLEST_BARE = 2**20
"""A smaller number without a unit is taken for GiB by people, and would be bytes."""


def _parse_bytes(text: Any, argument: str) -> int | None:
    """A size as `24GiB`, `80GB` or a number of bytes; None for anything else."""
    if not isinstance(text, str):
        raise ValueError(f"{argument}={text!r}: must be text, such as '24GiB'")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match.group(2).lower() or "b") if match else None
    if match is None or unit is None or float(match.group(1)) <= 0:
        return None
    if not match.group(2) and float(match.group(1)) < _SMALLEST_BARE:
        number = match.group(1)
        raise ValueError(f"{argument}={text!r}: {number} would be bytes; did you mean {number}GiB?")
    return int(float(match.group(1)) * unit)


def next_card(num_bytes: int) -> str | None:
    """The smallest known card that holds so many bytes; None where none does."""
    holding = [(mib, name) for name, mib in _CARDS_MIB.items() if mib * 2**20 >= num_bytes]
    return min(holding)[1] if holding else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host memory that a run may take."""

    text: str
    total_bytes: int

    @classmethod
    def parse(cls, text: str) -> Host:
        """From `64GiB`, `64GB` or a number of bytes; `ValueError` for anything else."""
        found = _parse_bytes(text, "host")
        if found is None:
            raise ValueError(f"host={text!r} is no size; write 64GiB, 64GB or a number of bytes")
        return cls(text=text, total_bytes=found)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"text": self.text, "total_bytes": self.total_bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Device bytes that belong to no tensor: a range, and where its numbers come from."""

    name: str
    low: int
    expected: int
    high: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card by its memory."""

    text: str
    total_bytes: int

    @classmethod
    def parse(cls, text: str, *, argument: str = "gpu") -> Gpu:
        """From a card (`rtx4090`, `a100-80`), `24GiB`, `80GB` or a number of bytes.

        Raises `ValueError` for anything else, which calls it `argument`.
        """
        card = str(text).strip().lower().replace(" ", "").removeprefix("nvidia")
        if card in _CARDS_MIB:
            return cls(text=text, total_bytes=_CARDS_MIB[card] * 2**20)
        found = _parse_bytes(text, argument)
        if found is None:
            raise ValueError(
                f"{argument}={text!r} is neither a known card nor a size; write "
                f"{', '.join(_CARDS_MIB)}, or the size as 24GiB, 80GB or a number of bytes"
            )
        return cls(text=text, total_bytes=found)

    @staticmethod
    def overheads(
        rounded_peak_bytes: int,
        worst_peak_bytes: int | None = None,
        outside_peak_bytes: int = 0,
    ) -> list[Overhead]:
        """What a device holds beside an allocator's peak of `rounded_peak_bytes` in the steps.

        `worst_peak_bytes`: the peak when a router sends nearly all tokens to the same experts.
        `outside_peak_bytes`: that of loading, evaluation and resuming.
        """
        highest = max(rounded_peak_bytes, outside_peak_bytes)
        found = []
        if highest > rounded_peak_bytes:
            more = highest - rounded_peak_bytes
            source = "loading, evaluation or resuming, where it goes higher than the steps do"
            name = "outside the steps"
            found.append(Overhead(name=name, low=more, expected=more, high=more, source=source))
        if worst_peak_bytes is not None:
            more = max(worst_peak_bytes - highest, 0)
            source = "expected: all experts equally often; high: nearly all tokens to the same few"
            found.append(Overhead(name="routing", low=0, expected=0, high=more, source=source))
        return [
            *found,
            Overhead(
                name="fragmentation",
                source="0, 2 and 5 % of the peak; no bound is known",
                **{
                    bound: int(highest * (1 + share)) - highest
                    for bound, share in _FRAGMENTATION.items()
                },
            ),
            Overhead(
                name="CUDA context",
                source="pytorch issues 37250, 101159, 28113: 200 to 700 MiB; not measured by memrt",
                **_CONTEXT_BYTES,
            ),
            Overhead(
                name="cuBLAS workspace",
                source="PyTorch's CublasHandlePool.cpp: 8,519,680 bytes before Hopper, then 32 MiB",
                **_CUBLAS_BYTES,
            ),
        ]

    @staticmethod
    def required_bytes(
        rounded_peak_bytes: int,
        worst_peak_bytes: int | None = None,
        outside_peak_bytes: int = 0,
    ) -> dict[str, int]:
        """Low, expected and high device bytes around the allocator's predicted peak."""
        overheads = Gpu.overheads(rounded_peak_bytes, worst_peak_bytes, outside_peak_bytes)
        return {
            bound: rounded_peak_bytes + sum(getattr(each, bound) for each in overheads)
            for bound in ("low", "expected", "high")
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"text": self.text, "total_bytes": self.total_bytes}


def check_budget(text: str) -> None:
    """Refuse a `memory_budget` that is neither a card nor a size."""
    Gpu.parse(text, argument="memory_budget")
