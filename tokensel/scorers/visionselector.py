"""VisionSelector (arXiv 2510.16598) as a scorer: a linear rating of projected tokens, trained by answers."""

import os

from transformers import PretrainedConfig

from tokensel.model.visionselector import VisionSelector
from tokensel.scorers.learned import LearnedScorer

__all__ = ["VisionSelectorScorer"]


class VisionSelectorScorer(LearnedScorer):
    """Scores a projected token by the agreement of its query with the image's mean key.

    All visual tokens are projected for that. The tokens of an image are those of all its tiles together.
    """

    name = "visionselector"
    kind = VisionSelector
    needs_projection = True
    scope = "image"

    def __init__(self, visionselector: VisionSelector | str | os.PathLike | None = None):
        """
        Args:
            visionselector: a :class:`VisionSelector`, or the folder or hub id of one.

        Raises:
            TokenselError: it is missing or cannot be loaded.
        """
        super().__init__(visionselector)

    @staticmethod
    def width(config: PretrainedConfig) -> int:
        """Channels of a projected token: those of the language model."""
        return config.text_config.hidden_size
