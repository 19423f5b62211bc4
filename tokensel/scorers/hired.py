"""HiRED (Arif et al. 2024, arXiv 2408.10945): each tile's budget follows the thumbnail's CLS attention."""

import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.scorers.ranks import ranks_in_groups
from tokensel.utils.errors import TokenselError

__all__ = ["HiredScorer"]


class HiredScorer:
    """The thumbnail tells which tiles are worth tokens; in a tile the CLS token tells which.

    A tile's share is the CLS attention of the thumbnail that falls on what the tile shows. The best tokens of
    each tile are taken in proportion to the shares, by the method of highest averages (Sainte-Lague): the
    r-th best of a tile with share w scores ``w / (r - 1/2)``, so that one score serves every budget.

    What we chose: the paper reads an early layer of the encoder for the shares and its last one for the
    ranking; here both are the layer that the model reads. The thumbnail's own share is an option; of what the
    letterbox hides nothing counts.
    """

    name = "hired"
    needs_cls_attention = True
    scope = "image"
    adaptive = False

    def __init__(self, thumbnail_share: float = 0.5):
        """
        Args:
            thumbnail_share: of the budget, in (0, 1), where an image has more than one tile.

        Raises:
            TokenselError: it is no number in (0, 1).
        """
        if not isinstance(thumbnail_share, int | float) or not 0 < thumbnail_share < 1:
            raise TokenselError(
                f"thumbnail_share is {thumbnail_share!r}: give a number in (0, 1), such as 0.5"
            )
        self.thumbnail_share = float(thumbnail_share)

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """Share of the token's tile over its rank there. A row is one image.

        Raises:
            TokenselError: the features carry no CLS attention, or not where each token is from.
        """
        attention, tile, centre = features.cls_attention, features.tile, features.centre
        if attention is None:
            raise TokenselError(
                "scorer 'hired' has no CLS attention to read: ask the encoder for it, or choose another "
                "scorer where the encoder has no CLS token"
            )
        if tile is None or centre is None:
            raise TokenselError(
                "scorer 'hired' needs Features.tile and Features.centre: score an encoded batch, which has "
                "them"
            )
        attention = attention.float()
        real = torch.ones_like(tile, dtype=torch.bool) if features.valid is None else features.valid
        # padding gets a tile of its own, behind all others
        group = tile.masked_fill(~real, tile.shape[1])
        on_map = real & (tile > 0)
        # the thumbnail is the first tile, whole and square: its cells are the first columns of the row
        side = ((tile == 0) & real).sum(1, keepdim=True).float().sqrt()
        row, column = ((centre * side[:, :, None]).floor().minimum(side[:, :, None] - 1)).long().unbind(-1)
        under = (row * side.long() + column).clamp(min=0)  # cell of the thumbnail that shows the same
        shown = attention.gather(1, under).masked_fill(~on_map, 0.0)
        total = shown.sum(1, keepdim=True)
        shares = torch.zeros(len(tile), tile.shape[1] + 1, device=tile.device).scatter_add_(1, group, shown)
        shares = shares / total.clamp(min=torch.finfo(torch.float32).tiny) * (1 - self.thumbnail_share)
        shares[:, 0] = self.thumbnail_share
        place = ranks_in_groups(attention, group)
        return shares.gather(1, group) / (place + 0.5)
