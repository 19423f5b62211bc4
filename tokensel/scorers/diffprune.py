"""DiffPrune (arXiv 2605.28051) as a scorer: what a frozen model needed for its answers, by two layers."""

import os

from tokensel.model.diffprune import DiffPrune
from tokensel.scorers.learned import LearnedScorer

__all__ = ["DiffPruneScorer"]


class DiffPruneScorer(LearnedScorer):
    """Scores a token by its logit; kept tokens are the encoder's own, without noise and without a denoiser.

    Each tile is scored as a whole, letterbox included, as in training; all tiles of an image then compete for
    one budget. Positions are the original ones under the default of ``positions``.
    """

    name = "diffprune"
    kind = DiffPrune

    def __init__(self, diffprune: DiffPrune | str | os.PathLike | None = None):
        """
        Args:
            diffprune: a :class:`DiffPrune`, or the folder or hub id of one.

        Raises:
            TokenselError: it is missing or cannot be loaded.
        """
        super().__init__(diffprune)
