"""Random bits from a counter and a key: the same on every device, and no generator to save.

    mix(x): x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x68BC21EB;  x ^= x >> 16

on 32-bit words, a bijection: modulo 2^32, and with shifts that bring zeros in. Both factors are
odd, and below 2^31, so that they are numbers of int32, which PyTorch multiplies on every device
(it has no shifts of uint32).
"""

from __future__ import annotations

from hashlib import blake2b

from torch import Tensor

__all__ = ["MULTIPLIERS", "key_words", "mix"]

MULTIPLIERS = (0x7FEB352D, 0x68BC21EB)


def key_words(*numbers: int) -> tuple[int, int]:
    """Two words below 2^31 for a seed and whatever else sets a use of it apart."""
    digest = blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    low, high = (int.from_bytes(part, "big") >> 1 for part in (digest[:4], digest[4:]))
    return low, high


def mix(x: Tensor) -> Tensor:
    """The bijection, of words in int32."""
    first, second = MULTIPLIERS
    x = (x ^ (x >> 16 & 0xFFFF)) * first
    x = (x ^ (x >> 15 & 0x1FFFF)) * second
    return x ^ (x >> 16 & 0xFFFF)
