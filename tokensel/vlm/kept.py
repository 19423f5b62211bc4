"""Where in the image the kept tokens are, whether a scorer kept them or a schedule."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokensel.schedules.prune import Pruning
from tokensel.utils.errors import TokenselError, check_count
from tokensel.vlm.encoded import Encoded
from tokensel.vlm.reduce import Reduced

__all__ = ["kept_by_place", "kept_cells"]


def kept_cells(encoded: Encoded, chosen: Reduced | Pruning) -> Bool[Tensor, "cells"]:
    """Which visual cells of a batch were kept, in packed order, newlines left out.

    Args:
        encoded: the batch.
        chosen: what a scorer made of it, or what a schedule did to the whole prompt in the prefill; of
            several cuts the last counts.

    Raises:
        TokenselError: tiles that were encoded again at another size have no cells in common with the batch.
    """
    layout = encoded.layout
    if isinstance(chosen, Reduced):
        if chosen.kept is None:
            raise TokenselError("the image was encoded again at another size: no token of it was kept or not")
        return chosen.kept.flatten()[layout.source[layout.cell]]
    prompt = chosen.prompt
    marks = prompt.visual.clone()  # columns of the whole prompt
    for drop in chosen.drops:
        if drop.step == 0:
            rows, places = (drop.columns >= 0).nonzero(as_tuple=True)
            marks = torch.zeros_like(marks).index_put_((rows, drop.columns[rows, places]), torch.tensor(True))
    return marks[prompt.cells]


def kept_by_place(
    kept: Bool[Tensor, "cells"], place: Float[Tensor, "cells"], bins: int = 10
) -> Float[Tensor, "bins"]:
    """A histogram of kept positions: of the cells in each part of the image, the share that is kept.

    A choice that does not depend on the place gives every part the same share, that of the whole. Attention
    with rotary positions favours the end of the prompt, which is the bottom of the image (Endo et al. 2025,
    arXiv 2412.13180).

    Args:
        kept: of a batch, in packed order.
        place: of each cell, 0 to 1, such as the height ``encoded.layout.centres[:, 0]``.
        bins: parts of equal size.

    Returns:
        One share for each part; NaN for parts without cells.
    """
    bins = check_count("bins", bins, 10)
    part = (place * bins).long().clamp(0, bins - 1)
    return torch.bincount(part[kept], minlength=bins) / torch.bincount(part, minlength=bins)
