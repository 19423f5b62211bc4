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
    """L_pr of Eq. (6): the share of each image's tokens that the mask keeps."""
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
    """Eq. (7): ||F^rec - F||_2 + max(L_pr, p)."""
    l_rec = mean(distance(reconstructed, features, valid) / scale)
    l_pr = mean(retained_fraction(mask, valid))
    return Objective(l_rec + l_pr.clamp(min=p), l_rec, l_pr)
