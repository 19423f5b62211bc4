"""Uniform grid: any budget spread evenly over the tile, whatever the image shows."""

from functools import lru_cache
from math import isqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokensel.data.features import Features

__all__ = ["UniformScorer", "even_order"]


@lru_cache(maxsize=256)
def even_order(tokens: int, width: int | None = None) -> Int[Tensor, "tokens"]:
    """Order the cells of a grid so that the first k are spread evenly, for every k.

    Farthest-point order on a torus: each next cell is the one farthest from all cells taken before;
    among equals the one with the least crowding (sum of inverse fourth powers of the distances),
    then the first in raster order. The torus makes the pattern continue across the borders of
    neighbouring tiles, where a plain farthest-point order would crowd. On grids whose side is a power of
    two it visits the same lattices as an ordered dither.

    Args:
        tokens: cells of the grid.
        width: its columns; by default the grid is a square, or one line where ``tokens`` is no square.

    Returns:
        Cell indices in the order they are taken.
    """
    side = isqrt(tokens)
    width = width or (side if side * side == tokens else tokens)
    height = tokens // width
    dy = torch.arange(height, dtype=torch.float64).reshape(-1, 1)
    dx = torch.arange(width, dtype=torch.float64).reshape(1, -1)
    # squared torus distance of every cell to cell 0; for other cells it is the same map, rolled
    base = torch.minimum(dy, height - dy) ** 2 + torch.minimum(dx, width - dx) ** 2
    crowd = 1.0 / base.clamp(min=0.5) ** 2
    nearest = torch.full((height, width), float("inf"), dtype=torch.float64)
    crowding = torch.zeros(height, width, dtype=torch.float64)
    order, cell = [], 0
    for _ in range(tokens):
        order.append(cell)
        shift = divmod(cell, width)
        nearest = torch.minimum(nearest, base.roll(shift, (0, 1)))
        crowding += crowd.roll(shift, (0, 1))
        rest = crowding.masked_fill(nearest < nearest.max(), float("inf")).flatten()
        # rounded, so that equal by symmetry is equal in floating point and raster order decides
        cell = int(torch.round(rest, decimals=9).argmin())
    return torch.tensor(order)


class UniformScorer:
    """Scores by :func:`even_order`: 1 for the cell taken first, falling to 1/tokens for the last."""

    name = "uniform"
    needs_cls_attention = False
    scope = "tile"
    adaptive = False

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """The same scores for every tile of the same size, ``[tiles, tokens]``; 0 beyond a smaller one."""
        tiles, tokens, _ = features.tokens.shape
        if features.grid is not None:
            ragged = torch.zeros(tiles, tokens)
            for tile, (height, width) in enumerate(features.grid.tolist()):
                cells = height * width
                ragged[tile, even_order(cells, width)] = torch.arange(cells, 0, -1) / cells
            return ragged.to(features.tokens.device)
        scores = torch.empty(tokens)
        scores[even_order(tokens)] = torch.arange(tokens, 0, -1) / tokens
        return scores.to(features.tokens.device).expand(tiles, tokens)
