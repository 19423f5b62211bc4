"""DART (Wen et al. 2025, arXiv 2502.11494): what duplicates a few pivot tokens goes first."""

import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.scorers.ranks import falling_ranks
from tokensel.utils.errors import check_count

__all__ = ["DartScorer"]


class DartScorer:
    """A few long tokens are pivots; the others are ranked by how little they resemble any one of them.

    The pivots are the tokens of the greatest l1 norm and stay. Then each pivot in turn names the token least
    like it by cosine, and so on down its list, so that a prefix is the choice at any budget.

    What we chose: the method prunes inside the language model and takes pivots from text and image; here all
    pivots are tokens of the image, and the features are the encoder's. The paper has every pivot keep its
    share at once; taking turns comes to the same shares at every budget.
    """

    name = "dart"
    needs_cls_attention = False
    scope = "image"
    adaptive = False

    def __init__(self, pivots: int = 8):
        """
        Args:
            pivots: how many tokens of an image are pivots, at least 1.

        Raises:
            TokenselError: ``pivots`` is no whole number of at least 1.
        """
        self.pivots = check_count("pivots", pivots, 8)

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """Scores in [0, 2]: pivots above 1, the others below. A row is one image."""
        tokens, valid = features.tokens.float(), features.valid
        count = tokens.shape[1]
        length = tokens.abs().sum(-1)
        order = falling_ranks(length, valid)
        pivot = order < min(self.pivots, count)
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        chosen = order.argsort(1)[:, : min(self.pivots, count)]  # [tiles, pivots]
        index = chosen[:, :, None].expand(-1, -1, tokens.shape[2])
        alike = unit.gather(1, index) @ unit.transpose(1, 2)  # [tiles, pivots, tokens]
        if valid is not None:
            alike = alike.masked_fill(~valid[:, None], 2.0)
        # the turn in which a pivot names a token; a token counts once, for the pivot that names it first
        turn = alike.argsort(dim=2, stable=True).argsort(2)
        if valid is not None:  # padding may be among the pivots of a very small image, and names nothing
            turn = turn.masked_fill(~valid.gather(1, chosen)[:, :, None], count)
        turn = turn.amin(1)
        falling = 1 - (turn + 1).float() / (count + 1)
        return torch.where(pivot, 2 - (order + 1).float() / (count + 1), falling)
