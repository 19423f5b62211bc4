"""Keep the lowest: the control that shows whether a ranking ranks."""

from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features

__all__ = ["LOWEST", "Lowest"]

LOWEST = "lowest-"  # in front of a scorer's name


class Lowest:
    """Another scorer upside down: what it would keep last is kept first, and nothing is merged.

    If this answers as well as the scorer itself, the scorer does not rank anything that matters.
    """

    adaptive = False

    def __init__(self, scorer):
        """
        Args:
            scorer: the scorer to turn around.
        """
        self.scorer, self.name = scorer, LOWEST + scorer.name
        self.needs_cls_attention, self.scope = scorer.needs_cls_attention, scorer.scope
        self.needs_question = getattr(scorer, "needs_question", False)
        self.needs_projection = getattr(scorer, "needs_projection", False)
        if hasattr(scorer, "check_model"):
            self.check_model = scorer.check_model

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """The negative of the scorer's scores."""
        return -self.scorer(features)
