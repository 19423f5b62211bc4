"""VisionZip (Yang et al. 2024, arXiv 2412.04467): dominant tokens by CLS attention, and contextual ones."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.scorers.merging import merge_nearest
from tokensel.scorers.ranks import falling_ranks
from tokensel.scorers.uniform import even_order
from tokensel.utils.errors import TokenselError

__all__ = ["VisionZipScorer"]


class VisionZipScorer:
    """Most kept tokens are what the CLS token attends to; a few, spread evenly, take up all that is dropped.

    The published 54 dominant and 10 contextual tokens are 27 to 5. Two lists name tokens at these rates, CLS
    attention and an even grid, and a token counts for the list that names it first, so that one score serves
    every budget and every tile keeps the same share of its tokens. At large budgets more of the grid is
    dominant already, and fewer tokens are contextual.

    What we chose: the paper spreads the contextual tokens over what is not dominant and finds the nearest by
    the encoder's keys; here they are spread over the tile, and nearest is by the cosine of features. A
    contextual token becomes the mean of itself and what it takes up.
    """

    name = "visionzip"
    needs_cls_attention = True
    scope = "tile"
    adaptive = False
    rates = (27, 5)  # dominant to contextual

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """The negative of the time at which the first of the two lists names a token."""
        dominant, contextual = self._times(features)
        return -torch.minimum(dominant, contextual)

    def merge(
        self, features: Features, kept: Bool[Tensor, "tiles tokens"]
    ) -> Float[Tensor, "tiles tokens channels"]:
        """What the tokens become: a dropped one goes into the nearest contextual one kept in its tile."""
        dominant, contextual = self._times(features)
        dropped = ~kept if features.valid is None else ~kept & features.valid
        return merge_nearest(features.tokens, kept & (contextual < dominant), dropped)

    def _times(
        self, features: Features
    ) -> tuple[Float[Tensor, "tiles tokens"], Float[Tensor, "tiles tokens"]]:
        if features.cls_attention is None:
            raise TokenselError(
                "scorer 'visionzip' has no CLS attention to read: ask the encoder for it, or choose another "
                "scorer where the encoder has no CLS token"
            )
        attention = features.cls_attention.float()
        count = attention.shape[1]
        even = even_order(count).argsort().to(attention.device)
        dominant, contextual = self.rates
        # the r-th of a list, counted from 1, is named at the time r over the list's rate
        first = (falling_ranks(attention) + 1).float() / dominant
        return first, ((even + 1).float() / contextual).expand_as(first)
