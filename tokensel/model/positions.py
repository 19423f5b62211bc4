"""Where a token stands: fixed sine and cosine codes, in two dimensions when the tokens form a square grid.

The paper does not mention position codes in its selector or reconstructor. Some are needed: all removed
tokens are replaced by one shared embedding (Sec. 4.1.1), which carries no place of its own, so without codes
the reconstructor could only return the same vector for every one of them.
"""

from functools import lru_cache
from math import isqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def sincos(tokens: int, channels: int) -> Float[Tensor, "tokens channels"]:
    """Codes for a row of ``tokens``: a square number is read as a grid, row by row; any other as a line.

    The first half of the channels of a grid tells the row and the second half the column. Frequencies fall
    geometrically from 1 to 1/10000 radians a step, as in "Attention is all you need", Sec. 3.5.
    """
    side = isqrt(tokens)
    if side * side != tokens or tokens == 1:
        return _waves(torch.arange(tokens), channels)
    place = torch.arange(side)
    half = channels // 2
    rows = _waves(place, half).repeat_interleave(side, dim=0)
    columns = _waves(place, channels - half).repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


def codes(
    tokens: int,
    channels: int,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    device: torch.device | None = None,
) -> Float[Tensor, "rows tokens channels"]:
    """Codes for a batch of rows, ``rows`` being 1 when all share theirs, else the batch.

    A row whose valid tokens all stand at its front is a row of just that many tokens, however far it was
    padded; its codes are those it would have alone. A row with holes keeps the codes of its full grid.
    """
    if valid is None:
        return _cached(tokens, channels, device or torch.device("cpu"))[None]
    lengths = valid.sum(dim=1)
    front = torch.arange(tokens, device=valid.device) < lengths[:, None]
    lengths = torch.where((front == valid).all(dim=1), lengths, tokens)
    table = torch.zeros(len(valid), tokens, channels, device=valid.device)
    for length in lengths.unique().tolist():
        table[lengths == length, :length] = _cached(length, channels, valid.device)
    return table


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or a table made while answering could not be trained with later
def _cached(tokens: int, channels: int, device: torch.device) -> Tensor:
    return sincos(tokens, channels).to(device)


def _waves(place: Tensor, channels: int) -> Tensor:
    """Sines then cosines of ``place`` [n] at falling frequencies: [n, channels]."""
    half = (channels + 1) // 2  # an odd width has one cosine less
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / max(half, 1))
    angle = place[:, None].double() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :channels].float()
