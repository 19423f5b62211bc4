"""From scores to a mask: how many tokens stay, and which ones (mask True = kept)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokensel.utils.errors import TokenselError, check_keep

__all__ = [
    "fraction_count",
    "hard",
    "measure_thresholds",
    "rank",
    "threshold_at",
    "top_count",
    "top_fraction",
]


def fraction_count(
    available: Int[Tensor, "rows"], keep: float | Float[Tensor, "rows"]
) -> Int[Tensor, "rows"]:
    """How many of ``available`` tokens the fraction ``keep`` is: ``max(1, round(keep * n))``, and 0 of 0.

    Halves round to the even number, as Python's ``round`` does. Each row may have a fraction of its own, in
    (0, 1].

    Raises:
        TokenselError: ``keep`` is a number that is not in (0, 1].
    """
    # float64, so that a product such as 0.29 * 100 rounds as Python rounds it
    keep = keep.double() if isinstance(keep, Tensor) else check_keep(keep)
    count = torch.round(available.double() * keep).long().clamp(min=1)
    return torch.minimum(count, available)


def rank(
    scores: Float[Tensor, "rows tokens"], valid: Bool[Tensor, "rows tokens"] | None = None
) -> Int[Tensor, "rows tokens"]:
    """The rank of each token in its row, 0 for the highest score.

    Of equal scores the first one wins; invalid tokens come last.

    Raises:
        TokenselError: a valid score is NaN, which has no rank.
    """
    real = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    if bool((scores.isnan() & real).any()):
        raise TokenselError("a token score is NaN: check the scorer and the features it was given")
    # Two stable sorts rather than a fill with -inf: a valid token may itself have the score -inf.
    order = scores.argsort(dim=1, descending=True, stable=True)
    real_first = real.gather(1, order).logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    order = order.gather(1, real_first)
    # order lists tokens by rank; its inverse permutation lists ranks by token
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def top_count(
    scores: Float[Tensor, "rows tokens"],
    count: Int[Tensor, "rows"],
    valid: Bool[Tensor, "rows tokens"] | None = None,
) -> Bool[Tensor, "rows tokens"]:
    """Keep the ``count`` highest-scored valid tokens of each row; of equals the first one wins.

    Args:
        scores: higher = keep first; values at invalid tokens are ignored.
        count: tokens to keep in each row; more than the row has keeps them all.
        valid: True where a token is real; ``None`` when all are.

    Raises:
        TokenselError: a valid score is NaN.
    """
    best = rank(scores, valid) < count[:, None]
    return best if valid is None else best & valid


def top_fraction(
    scores: Float[Tensor, "rows tokens"], keep: float, valid: Bool[Tensor, "rows tokens"] | None = None
) -> Bool[Tensor, "rows tokens"]:
    """Keep the best fraction of each row: exactly ``max(1, round(keep * n_valid))`` tokens.

    This is the fixed budget of the paper's experiments (Sec. 4.1.1: "select a fixed number of the most
    informative features" by logit). Ties go to the earlier token, so the result is deterministic.

    Args:
        scores: higher = keep first.
        keep: fraction of the valid tokens to keep, in (0, 1].
        valid: True where a token is real; ``None`` when all are. A row without a valid token keeps none.

    Raises:
        TokenselError: ``keep`` is not in (0, 1], or a valid score is NaN.
    """
    if valid is None:
        available = scores.new_full((scores.shape[0],), scores.shape[1], dtype=torch.long)
    else:
        available = valid.sum(1)
    return top_count(scores, fraction_count(available, keep), valid)


def hard(
    scores: Float[Tensor, "rows tokens"], valid: Bool[Tensor, "rows tokens"] | None = None
) -> Bool[Tensor, "rows tokens"]:
    """Keep the tokens that score above zero: the selector's own binary mask (paper Sec. 4.1.1).

    The count is adaptive and may be zero. A threshold of zero is meaningful only for scores that are a
    difference of two logits, such as the selector's.
    """
    mask = scores > 0
    return mask if valid is None else mask & valid


def measure_thresholds(scores: Float[Tensor, "tokens"]) -> list[float]:
    """The scores above which 1, 2, ... 99 % of some tokens lie, for :func:`threshold_at`; on the host."""
    shares = torch.arange(99, 0, -1, dtype=torch.float64) / 100  # above the quantile of .99 lies 1 %
    return torch.quantile(scores.cpu().double(), shares).tolist()


def threshold_at(thresholds: Sequence[float], keep: float) -> float:
    """The score above which the fraction ``keep`` lies; between the measured ones it is interpolated.

    Raises:
        TokenselError: ``keep`` is not in (0, 1].
    """
    if check_keep(keep) == 1:
        return -math.inf
    shares = [(index + 1) / (len(thresholds) + 1) for index in range(len(thresholds))]
    return float(np.interp(keep, shares, thresholds))
