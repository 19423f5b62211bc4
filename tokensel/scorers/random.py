"""Random selection, seeded so that what is drawn depends on the tile and on nothing else."""

import operator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokensel.data.features import Features
from tokensel.utils.errors import TokenselError

__all__ = ["RandomScorer", "mix"]

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


class RandomScorer:
    """Scores that are uniform in [0, 1) and a pure function of (seed, tile key, token index)."""

    name = "random"
    needs_cls_attention = False
    scope = "tile"
    adaptive = False

    def __init__(self, seed: int = 0):
        """
        Args:
            seed: any whole number; another seed gives other scores.

        Raises:
            TokenselError: the seed is no whole number.
        """
        try:
            self.seed = operator.index(seed)
        except TypeError:
            raise TokenselError(f"seed is {seed!r}: give a whole number, such as 0") from None

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """Uniform numbers ``[tiles, tokens]``; the same tile key gives the same row in any batch.

        Raises:
            TokenselError: the features carry no keys.
        """
        if features.keys is None:
            raise TokenselError(
                "scorer 'random' needs Features.keys: a stable number for each tile to draw by"
            )
        tiles = mix(mix(features.keys.long(), self.seed))[:, None]  # [tiles, 1]
        tokens = torch.arange(features.tokens.shape[1], device=tiles.device)[None, :]  # [1, tokens]
        return _shift(mix(tiles, tokens), 40).float() / (1 << 24)  # the top 24 bits fill a float32 exactly
