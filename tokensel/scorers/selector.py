"""The trained selector of the paper as a scorer."""

import os

from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.model.selector import TokenSelector
from tokensel.scorers.learned import LearnedScorer

__all__ = ["SelectorScorer"]


class SelectorScorer(LearnedScorer):
    """Scores a token by the selector's keep logit minus its drop logit (paper Sec. 4.1.1, last paragraph).

    Each tile is scored as a whole, letterbox included, as in the training of the shipped selectors, which saw
    the tiles of ``tiles="anyres"``; the budget then chooses among the tokens that reach the language model.
    Above zero means that the selector itself would keep the token.
    """

    name = "selector"
    kind = TokenSelector
    adaptive = True
    any_tower = True

    def __init__(self, selector: TokenSelector | str | os.PathLike | None = None):
        """
        Args:
            selector: a :class:`TokenSelector`, or the folder or hub id of one.

        Raises:
            TokenselError: the selector is missing or cannot be loaded.
        """
        super().__init__(selector)

    def threshold(self, keep: float) -> float:
        """The score above which a fraction of the tokens of its training lies, see the selector's own."""
        return self.model.threshold(keep)

    def _scores(
        self, model: TokenSelector, features: Features, tokens: Float[Tensor, "tiles tokens channels"]
    ) -> Float[Tensor, "tiles tokens"]:
        return model.scores(tokens, features.valid, features.grid)
