"""ApET (arXiv 2602.19870): what a few basis tokens do not approximate stays, the rest is merged into it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokensel.data.features import Features
from tokensel.scorers.merging import merge_nearest
from tokensel.utils.errors import check_count

__all__ = ["ApetScorer", "residual"]


def residual(
    tokens: Float[Tensor, "rows tokens channels"],
    basis: int,
    valid: Bool[Tensor, "rows tokens"] | None = None,
) -> Float[Tensor, "rows tokens"]:
    """The error of each token's least-squares reconstruction from ``basis`` of them, as an l2 norm.

    The basis is chosen farthest-point: first the longest token, then each time the one farthest from its
    nearest taken one. Basis tokens have the error 0.
    """
    tokens = tokens.float()
    rest = tokens.clone()  # what the basis so far does not explain
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if valid is None else valid
    far = torch.linalg.vector_norm(tokens, dim=-1)
    longest = far.amax(1)[:, None]
    for step in range(min(basis, tokens.shape[1])):
        far = far.masked_fill(~real, -1.0)
        # argmax leaves open which of several maxima it names; the first True of a comparison is the first
        best = (far == far.amax(1, keepdim=True)).to(torch.uint8).argmax(1)[:, None, None]
        best = best.expand(-1, -1, tokens.shape[2])
        away = torch.linalg.vector_norm(tokens - tokens.gather(1, best), dim=-1)
        far = away if step == 0 else torch.minimum(far, away)
        # projecting on orthogonal directions, one after the other, is least squares on the tokens themselves
        direction = rest.gather(1, best)
        length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        # what is left of a token that the others explain is rounding, and no direction
        known = length <= 1e-5 * longest[:, None]
        direction = torch.where(known, 0.0, direction / length.clamp(min=torch.finfo(torch.float32).tiny))
        rest = rest - (rest @ direction.transpose(1, 2)) * direction
    return torch.linalg.vector_norm(rest, dim=-1)


class ApetScorer:
    """Scores a token by what ten basis tokens leave unexplained of it; dropped tokens merge into kept ones.

    The nearest relative of the selector's idea, that what others reconstruct may go: linear, and without
    training.

    What we chose: the description leaves the distance, the first token and the fate of the basis open. The
    distance is Euclidean, the first token the longest, and basis tokens, whose error is 0, go like all others
    that are well explained. A dropped token merges into the kept one nearest by cosine, all with equal
    weight. Features are the encoder's, before the projector.
    """

    name = "apet"
    needs_cls_attention = False
    scope = "image"
    adaptive = False

    def __init__(self, basis: int = 10):
        """
        Args:
            basis: how many tokens the others are reconstructed from, at least 1.

        Raises:
            TokenselError: ``basis`` is no whole number of at least 1.
        """
        self.basis = check_count("basis", basis, 10)

    def __call__(self, features: Features) -> Float[Tensor, "tiles tokens"]:
        """Errors in the units of the features. A row is one image."""
        return residual(features.tokens, self.basis, features.valid)

    def merge(
        self, features: Features, kept: Bool[Tensor, "tiles tokens"]
    ) -> Float[Tensor, "tiles tokens channels"]:
        """What the tokens become: a kept one the mean of itself and of the dropped ones nearest to it."""
        dropped = ~kept if features.valid is None else ~kept & features.valid
        return merge_nearest(features.tokens, kept, dropped)
