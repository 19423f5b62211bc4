"""CLS attention: which tokens the encoder itself attends to."""

from jaxtyping import Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.utils.errors import TokenselError

__all__ = ["ClsScorer"]


class ClsScorer:
    """Scores a token by the attention the CLS token pays to it, averaged over heads.

    The signal of FasterVLM, HiRED and VisionZip. Encoders without a CLS token (SigLIP) have none.
    """

    name = "cls"
    needs_cls_attention = True
    scope = "tile"
    adaptive = False

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """Attention weights; the tokens of a tile sum to at most 1 (CLS itself takes the rest).

        Raises:
            TokenselError: the features carry no CLS attention.
        """
        if features.cls_attention is None:
            raise TokenselError(
                "scorer 'cls' has no CLS attention to read: ask the encoder for it, or choose another scorer "
                "where the encoder has no CLS token"
            )
        return features.cls_attention
