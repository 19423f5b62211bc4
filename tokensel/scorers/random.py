"""Random selection, seeded so that what is drawn depends on the tile and on nothing else."""

import operator

import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.utils.errors import TokenselError
from tokensel.utils.hashing import mix, uniform

__all__ = ["RandomScorer"]


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
        return uniform(tiles, tokens)
