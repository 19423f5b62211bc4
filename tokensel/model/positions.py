"""Position codes: fixed sines and cosines, in two dimensions when the tokens form a grid.

The paper does not mention position codes in its selector or reconstructor. Some are needed: all removed
tokens are replaced by one shared embedding (Sec. 4.1.1), which carries no position, so without codes the
reconstructor could only return the same vector for every one of them.
"""

from functools import lru_cache
from math import isqrt

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sincos(tokens: int, channels: int) -> Float[Tensor, "tokens channels"]:
    """Codes for a row of ``tokens``: a square number is read as a grid, row by row; any other as a line.

    The first half of the channels of a grid encodes the row and the second half the column. Frequencies fall
    geometrically from 1 to 1/10000 radians a step, as in "Attention is all you need", Sec. 3.5.
    """
    side = isqrt(tokens)
    if side * side != tokens or tokens == 1:
        return _waves(torch.arange(tokens), channels)
    return grid_codes(side, side, channels)


def grid_codes(height: int, width: int, channels: int) -> Float[Tensor, "tokens channels"]:
    """Codes for a grid of ``height`` rows and ``width`` columns, row by row."""
    half = channels // 2
    # token i is in row i // width and column i % width: [height, half] -> [tokens, half]
    rows = _waves(torch.arange(height), half).repeat_interleave(width, dim=0)
    columns = _waves(torch.arange(width), channels - half).repeat(height, 1)
    return torch.cat([rows, columns], dim=1)


def position_codes(
    tokens: int,
    channels: int,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    device: torch.device | None = None,
    grid: Int[Tensor, "batch 2"] | None = None,
) -> Float[Tensor, "rows tokens channels"]:
    """Codes for a batch of rows; ``rows`` is 1 when all rows share the same codes, else the batch size.

    A row whose valid tokens all come first is padded: its codes are those of an unpadded row with that many
    tokens. A row with holes keeps the codes of its full grid. ``grid`` holds rows and
    columns of each tile where they are no squares of one size.
    """
    if grid is not None:
        shapes = [tuple(shape) for shape in grid.tolist()]
        table = torch.zeros(len(shapes), tokens, channels, device=device)
        for row, (height, width) in enumerate(shapes):
            table[row, : height * width] = _cached_grid(height, width, channels, table.device)
        return table
    if valid is None:
        return _cached(tokens, channels, device or torch.device("cpu"))[None]
    lengths = valid.sum(dim=1)
    # what a row with that many valid tokens and padding behind them looks like: [batch, tokens]
    padded = torch.arange(tokens, device=valid.device) < lengths[:, None]
    lengths = torch.where((padded == valid).all(dim=1), lengths, tokens)
    table = torch.zeros(len(valid), tokens, channels, device=valid.device)
    for length in lengths.unique().tolist():
        table[lengths == length, :length] = _cached(length, channels, valid.device)
    return table


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached table made in inference mode could not be used in training later
def _cached(tokens: int, channels: int, device: torch.device) -> Tensor:
    return sincos(tokens, channels).to(device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _cached_grid(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    return grid_codes(height, width, channels).to(device)


def _waves(index: Tensor, channels: int) -> Tensor:
    """Sines, then cosines of ``index`` [n] at falling frequencies: [n, channels]."""
    half = (channels + 1) // 2  # an odd width has one cosine less
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / max(half, 1))
    angle = index[:, None].double() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :channels].float()
