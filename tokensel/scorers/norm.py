"""Feature norm: the length of each token's vector."""

import torch
from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features

__all__ = ["NormScorer"]


class NormScorer:
    """Scores a token by the l2 norm of its feature vector: long vectors stay."""

    name = "norm"
    needs_cls_attention = False
    scope = "tile"
    adaptive = False

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """Norms in the units of the features, ``[tiles, tokens]``."""
        return torch.linalg.vector_norm(features.tokens.float(), dim=-1)
