"""Random numbers that are a pure function of whole numbers: the same on every device and in every batch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["mix", "uniform"]

_WORD = (1 << 64) - 1


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit ``word`` (torch has no arithmetic for those)."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


# splitmix64 (Steele, Lea, Flood 2014): the increment and the two multipliers of its finaliser
_GAMMA, _M1, _M2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's ``>>`` copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Int[Tensor, "..."], y: Int[Tensor, "..."] | int = 0) -> Int[Tensor, "..."]:
    """Hash two int64 numbers into one, elementwise and broadcast: splitmix64 of ``x`` advanced by ``y``.

    Pure integer arithmetic that wraps, hence the same on every device and in every batch.
    """
    y = torch.as_tensor(_signed(y) if isinstance(y, int) else y, device=x.device)
    z = x + (y + 1) * _GAMMA
    z = (z ^ _shift(z, 30)) * _M1
    z = (z ^ _shift(z, 27)) * _M2
    return z ^ _shift(z, 31)


def uniform(x: Int[Tensor, "..."], y: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A number in [0, 1) for each pair of int64 numbers, broadcast: the top 24 bits of :func:`mix`."""
    return _shift(mix(x, y), 40).float() / (1 << 24)  # 24 bits fill a float32 exactly
