"""What is minimised: Eqs. (6) and (7) of the paper."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Objective(NamedTuple):
    """The loss of Eq. (7) and its two terms, scalars; ``l_pr`` is the retained fraction before the hinge."""

    loss: Float[Tensor, ""]
    l_rec: Float[Tensor, ""]
    l_pr: Float[Tensor, ""]


def retained_fraction(
    mask: Float[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch"]:
    """L_pr of Eq. (6): the fraction of each image's tokens that the mask keeps."""
    if valid is None:
        return mask.mean(dim=1)
    return (mask * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def distance(
    reconstructed: Float[Tensor, "batch tokens channels"],
    features: Float[Tensor, "batch tokens channels"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch"]:
    """||F^rec - F||_2 of each image: the square root of the summed squares over its tokens and channels."""
    difference = (reconstructed - features).float()
    if valid is not None:
        difference = difference.masked_fill(~valid[..., None], 0.0)
    return torch.linalg.vector_norm(difference.flatten(1), dim=1)


def objective(
    reconstructed: Float[Tensor, "batch tokens channels"],
    features: Float[Tensor, "batch tokens channels"],
    mask: Float[Tensor, "batch tokens"],
    p: float,
    scale: float,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> Objective:
    """Eq. (7): ||F^rec - F||_2 + max(L_pr, p), averaged over the images of a batch.

    The norm is the l2 norm of one image's whole tensor, neither squared nor averaged
    over its elements. The weight of L_pr is 1, as in the paper. The paper does not
    state the unit of the norm, and the unit decides the result. The norm is concave in
    the fraction of tokens kept, so the sum has its minima at the ends. In the encoder's
    own units the norm is in the hundreds (576 x 1024 values): L_pr <= 1 is negligible
    and all tokens are kept. In units that make both terms comparable, and without the
    hinge, dropping lowers the loss until the reconstructor has learned to use what is
    kept: L_pr falls to 0, the collapse of Sec. 4.3, unless the reconstructor learns in
    time.

    Args:
        reconstructed: F^rec.
        features: F, in the encoder's own units; it is not standardised.
        mask: M, 1 = kept; its gradient reaches the selector.
        p: keeping costs nothing below this fraction (Eq. 3); 0 switches the hinge off.
        scale: the distance that counts as 1. Training takes the typical ||F - mean||_2
            of a tile, so that L_rec = 1 means "no better than the mean token
            everywhere" for every encoder and tile size.
        valid: True where a token is real; ``None`` when all are.
        mean: the average over images; with several processes, over the images of all of
            them. The hinge is on the average, so that one image may keep more than p
            and another less: this is the adaptive count of the paper's title. A hinge
            on each image's own count reconstructed worse in a trial.
    """
    l_rec = mean(distance(reconstructed, features, valid) / scale)
    l_pr = mean(retained_fraction(mask, valid))
    return Objective(l_rec + l_pr.clamp(min=p), l_rec, l_pr)
